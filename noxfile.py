"""Every check and every campaign of the project; `nox -l` lists them, `nox -s NAME` runs one in its own environment."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "lint", "types", "docs", "build"]
nox.options.error_on_missing_interpreters = False

PROJECT = nox.project.load_toml("pyproject.toml")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "REGRAFT_CACHE_SIZE": "0",
}  # fmt: skip
"""For whatever computes twice to compare, or measures: no result of a step from an earlier run."""


def install(session, *groups, dependencies=True):
    """The package, editable, with its dependencies, and the named groups, at the versions of constraints.txt."""
    wanted = nox.project.dependency_groups(PROJECT, *groups) if groups else ()
    if dependencies:
        session.install("-q", "-c", "constraints.txt", "-e", ".", *wanted)
        return
    session.install("-q", "-c", "constraints.txt", *wanted)
    session.install("-q", "--no-deps", "-e", ".")


@nox.session
def demo(session):
    """Install regraft and run the quickstart recipe on the embedded demo:tiny model."""
    install(session)
    session.run("regraft", "apply", "quickstart", "--force", *session.posargs)


@nox.session
def tests(session):
    """Run the tests, a process for each processor; coverage of core and of plugins must be 90% or more."""
    install(session, "tests")
    if session.posargs:
        session.run("pytest", *session.posargs, env=ONE_THREAD)
        return
    processes = str(min(os.cpu_count() or 1, 8))
    session.run("pytest", "-n", processes, "--dist", "loadfile", "--cov", "--cov-report=", env=ONE_THREAD)
    for rooms in ("core/*", "plugins/*"):
        session.run("coverage", "report", f"--include={rooms}", "--fail-under=90", "--skip-covered", "--precision=1")


@nox.session
def examples(session):
    """Install the packages of examples/ as a user would, and run their tests: the conformance suite among them."""
    install(session)
    packages = sorted(str(path.parent) for path in Path("examples").glob("*/pyproject.toml"))
    session.install("-q", "-c", "constraints.txt", *packages, "pytest>=8.2")
    for package in packages:
        with session.chdir(package):
            session.run("pytest", "-q", *session.posargs, env=ONE_THREAD)


@nox.session
def lint(session):
    """Formatting, lint rules, import contracts, and the schemas of the workflows and of action.yml."""
    install(session, "lint", dependencies=False)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports", "--no-cache")
    workflows = sorted(str(path) for path in Path(".github/workflows").glob("*.yml"))
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *workflows)
    session.run("check-jsonschema", "--builtin-schema", "vendor.github-actions", "action.yml")


@nox.session
def types(session):
    """Type-check the whole package, and the fuzz targets, strictly."""
    install(session, "types")
    session.run("mypy", "-p", "regraft", "-p", "tests.fuzz", env={"MYPYPATH": ".hatch/editable:."})


@nox.session
def docs(session):
    """Build the manual, warnings as errors; the reference pages must be what the code says."""
    install(session, "docs")
    session.run("python", "docs/generate.py", *([] if session.posargs == ["write"] else ["--check"]))
    session.run("mkdocs", "build", "--strict", "--quiet", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session):
    """Build wheel and sdist after an editable install, and compare the wheel with the files on disk."""
    install(session, "build", dependencies=False)
    target = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(target), ".", silent=True)
    session.run("python", "tests/packaging/compare_wheel.py", str(target))


@nox.session
def e2e(session):
    """Campaigns on a real model (SmolLM2-135M from a wheel), reloaded without regraft. `-- short` for CI."""
    install(session, "tests")
    session.run("python", "tests/end_to_end/campaigns.py", *session.posargs, env=ONE_THREAD)


@nox.session
def faults(session):
    """Kill, interrupt, starve and confuse `apply`, then fuzz every parser with atheris. `-- short` for CI."""
    install(session, "tests", "fuzz")
    session.run("python", "-m", "tests.faults.campaign", *session.posargs, env=ONE_THREAD)
    some = ["header", "gguf", "recipe", "tokenizer", "--seconds=2"] if "short" in session.posargs else ["--seconds=15"]
    session.run("python", "-m", "tests.fuzz.coverage_guided", *some, env=ONE_THREAD)


@nox.session
def audit(session):
    """Known vulnerabilities of all dependencies; fails, and says so, where the advisory service does not answer."""
    install(session, "audit")
    session.run("python", "tests/packaging/audit.py", *session.posargs)


@nox.session
def bench(session):
    """Side by side with cp, mergekit, peft and transformers; writes docs/benchmarks.md. `-- --small` tries it out."""
    install(session, "tests", "bench")
    session.run("python", "benchmarks/side_by_side.py", *session.posargs)
    session.run("python", "benchmarks/training.py", *session.posargs, env=ONE_THREAD)
    session.run("python", "benchmarks/calibrated_attention.py", *session.posargs, env=ONE_THREAD)
    session.run("python", "benchmarks/fourier_head.py", *session.posargs, env=ONE_THREAD)
    session.run("python", "benchmarks/vocabulary.py", *session.posargs, env=ONE_THREAD)


@nox.session
def kernels(session):
    """Kernels in Triton's interpreter, then compiled for sm_80 and sm_90: registers, shared memory, spills."""
    install(session, "tests")
    common = {"TRITON_DEFAULT_FP_FUSION": "1"}
    session.run("pytest", "tests/kernels", *session.posargs, env={**ONE_THREAD, **common, "TRITON_INTERPRET": "1"})
    session.run("python", "benchmarks/kernel_resources.py", env=common)


@nox.session
def demo_tiny(session):
    """Train demo:tiny again from the text of Debian's bible-kjv packages: see core/demo/README.md."""
    install(session)
    session.run("python", "-m", "regraft.core.demo.train", *session.posargs, env={**os.environ, **ONE_THREAD})
