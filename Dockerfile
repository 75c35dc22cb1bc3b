# regraft with CUDA:  docker build -t regraft . && docker run --gpus all -v "$PWD:/data" regraft apply recipe.toml
# torch's wheels bring CUDA's libraries; the host needs NVIDIA's driver and container toolkit, and nothing else.
FROM python:3.12-slim-bookworm AS build
RUN python -m venv /opt/regraft
ENV PATH=/opt/regraft/bin:$PATH
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY cli cli
COPY core core
COPY kernels kernels
COPY plugins plugins
COPY recipes recipes
COPY docs/reference/regraft.1 docs/reference/regraft.1
ARG EXTRAS=""
# hadolint ignore=DL3013  # this folder, and no package of an index
RUN pip install --no-cache-dir ".${EXTRAS}"

FROM python:3.12-slim-bookworm
# Triton builds its launchers with a C compiler when a kernel first runs
# hadolint ignore=DL3008  # Debian keeps one version of each, and removes what it replaces
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/regraft /opt/regraft
ENV PATH=/opt/regraft/bin:$PATH NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# any user may run it: homes and caches lie in the mounted folder or in /tmp
ENV HOME=/tmp HF_HOME=/data/.cache/huggingface TRITON_CACHE_DIR=/tmp/triton
WORKDIR /data
ENTRYPOINT ["regraft"]
CMD ["--help"]
