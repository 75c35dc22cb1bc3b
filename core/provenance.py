"""`regraft.lock.json`: what went in, what came out, and what did it; and the model card. No absolute path, no clock."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from regraft.core.buffers import unreadable
from regraft.core.checkpoint import Checkpoint
from regraft.core.file_patterns import from_pattern, matched
from regraft.core.layout import Layout
from regraft.core.patch import Patch
from regraft.core.plan import BASE_CARD, Plan, PlannedStep, paths_of, place_of, stored_base
from regraft.core.processes import processes
from regraft.core.realised import Realised
from regraft.core.sources.folder import CARD, LOCK
from regraft.core.writer import WriteReport

if TYPE_CHECKING:
    from regraft.core.recipe.model import Recipe

LOCK_SCHEMA = 1
_MATTER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_INHERITED = re.compile(r"^(?:license|license_name|license_link|pipeline_tag): *[\w./:-]+$", re.MULTILINE)
PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "bitsandbytes", "gguf", "matplotlib",
)  # fmt: skip
"""What computes, or draws: with another version of one of these the output can have other bytes."""


def lock_document(
    plan: Plan,
    patches: Sequence[Patch],
    layout: Layout,
    written: WriteReport,
    output: Path,
    device: str,
    realised: Realised,
) -> dict[str, Any]:
    """The lock file of a finished run.

    Args:
        plan: what was planned.
        patches: what each step returned.
        layout: the weight files as written.
        written: digests that the writer took.
        output: the folder as written, whose other files are hashed here.
        device: class of device that computed, `cpu` or `cuda`.
        realised: what became of changes of quantised weights.
    """
    weights = {shard.name for shard in layout.shards}
    recipe = portable_recipe(plan.recipe)
    return {
        "schema": LOCK_SCHEMA,
        "regraft": package_version("regraft"),
        "recipe": recipe,
        "base": _base(plan, recipe, written),
        "steps": [_step(step, patch) for step, patch in zip(plan.steps, patches, strict=True)],
        "output": {
            "tensors": _tensors(layout, written),
            "files": _files(output, weights | {LOCK}),
            "left_behind": dict(sorted(plan.result.left_behind.items())),
            **({"quantised": metrics} if (metrics := realised.metrics()) else {}),
        },
        "non_finite_inputs": {name: vars(count) for name, count in sorted(written.non_finite.items())},
        "environment": environment(device, torch_threads(plan, device)),
    }


def portable_recipe(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without what only this machine and this run know: where the output went, and the folders
    above inputs that were named by an absolute path. Digests tell which inputs they were.
    """
    resolved = recipe.resolved()
    resolved["output"].pop("path", None)
    named: dict[str, Any] = _without_folders(resolved)
    return named


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if isinstance(value, str) and value.startswith("/"):
        if (path := Path(value)).exists():
            return path.name or value
        if matched(value):
            return from_pattern(value)
    return value


def torch_threads(plan: Plan, device: str) -> int | None:
    """How many threads torch computes with, where that decides bits: on the CPU, in a step that works by itself. What
    the writer computes, and thus all that weight-space steps do, is the same under any number.
    """
    if device != "cpu" or not any(step.works_by_itself for step in plan.steps):
        return None
    import torch

    return torch.get_num_threads()


def environment(device: str, threads: int | None = None) -> dict[str, Any]:
    """Versions of what computes, and the kind of machine; `threads`: see `torch_threads`."""
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "device": device.split(":")[0],
        **({} if threads is None else {"torch_threads": threads}),
        **({"processes": world} if (world := processes().world) > 1 else {}),
    }


def package_version(name: str) -> str | None:
    """The installed version of a package; the package is not imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def sha256(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def _files(output: Path, without: set[str]) -> dict[str, dict[str, Any]]:
    names = {path.relative_to(output).as_posix(): path for path in sorted(output.rglob("*")) if path.is_file()}
    return {
        name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for name, path in names.items()
        if name not in without
    }


def _base(plan: Plan, recipe: Mapping[str, Any], written: WriteReport) -> dict[str, Any]:
    """What went in: digests of the tensors that were copied, perhaps to another name, and of those that were read."""
    base, stored = plan.base, stored_base(plan.base, plan.result)
    names = {place_of(tensor): name for name, tensor in stored.tensors.items()}
    copied = {names[place_of(plan.result.tensors[new])]: written.digests.get(new) for new in plan.changes["copied"]}
    inputs = {**copied, **written.input_digests}
    return {
        "model": recipe["base"]["model"],
        **base.origin,
        "digest": base.digest,
        "tensors": {name: inputs[name] for name in stored.specs if inputs.get(name)},
    }


def _step(step: PlannedStep, patch: Patch) -> dict[str, Any]:
    kind = type(step.transformation)
    return {
        "id": step.id,
        "use": kind.name,
        "version": kind.version,
        "plugin": step.plugin.distribution,
        "plugin_version": step.plugin.version,
        "data": data_digests(step.params),
        "metrics": dict(patch.metrics),
        "notes": list(patch.notes),
    }


def data_digests(params: BaseModel) -> dict[str, Any]:
    """SHA-256 of every file that a parameter names, by parameter; of a folder or a pattern by relative path."""
    digests: dict[str, Any] = {}
    for key, path in paths_of(params):
        if path.is_file():
            digests[key] = sha256(path)
        elif path.is_dir():
            files = sorted(inner for inner in path.rglob("*") if inner.is_file())
            digests[key] = {inner.relative_to(path).as_posix(): sha256(inner) for inner in files}
        elif files_by_name := matched(path):
            digests[key] = {name: sha256(file) for name, file in files_by_name.items()}
    return digests


def _tensors(layout: Layout, written: WriteReport) -> dict[str, Any]:
    return {
        tensor.spec.name: {
            "dtype": tensor.spec.dtype,
            "shape": list(tensor.spec.shape),
            "file": shard.name,
            "digest": written.digests.get(tensor.spec.name),
        }
        for shard in layout.shards
        for tensor in shard.tensors
    }


def model_card(plan: Plan, patches: Sequence[Patch], result: Checkpoint, realised: Realised) -> bytes:
    """README.md of the output: front matter that hubs read, then what was done in which order."""
    model = portable_recipe(plan.recipe)["base"]["model"]
    lines = [*_front_matter(plan), "", f"# {plan.recipe.name}", "", f"Written by regraft from `{model}`."]
    lines += ["", "| step | transformation | source |", "|---|---|---|"]
    lines += [
        f"| {step.id} | {step.transformation.summary} | {step.transformation.paper or '-'} |" for step in plan.steps
    ]
    for step, patch in zip(plan.steps, patches, strict=True):
        lines += _step_section(step, patch)
    if (note := realised.note()) is not None:
        lines += ["", "## Quantised weights", "", f"- {note}"]
    use = adapter_usage(plan.base.origin) if plan.recipe.writes_adapter else usage("auto_map" in result.config)
    lines += ["", "## Use", "", "```python", *use, "```"]
    if BASE_CARD in result.files:
        lines += ["", f"The card of the base is in `{BASE_CARD}`; its licence applies."]
    lines += ["", f"Every digest, version and parameter is in `{LOCK}`; `regraft verify` recomputes them."]
    return ("\n".join(lines) + "\n").encode()


def _front_matter(plan: Plan) -> list[str]:
    """What hubs read of a model card; the licence and the kind of model are the base's."""
    adapter = plan.recipe.writes_adapter
    front = ["---", f"library_name: {'peft' if adapter else 'transformers'}", "tags:", "- regraft"]
    if adapter:
        front.append("- lora")
    if plan.base.origin.get("source") == "hub":
        front.append(f"base_model: {plan.recipe.base.model}")
    return [*front, *inherited(plan.base), "---"]


def inherited(base: Checkpoint) -> list[str]:
    """Lines of front matter that hold for a base and for what is made of it: licence and kind of model."""
    card, licence = base.files.get(CARD), base.origin.get("license")
    lines = _INHERITED.findall(front_matter(card.read().decode("utf-8", "replace"))) if card else []
    if isinstance(licence, str) and not any(line.startswith("license:") for line in lines):
        lines += _INHERITED.findall(f"license: {licence}")
    return lines


def adapter_usage(origin: Mapping[str, Any]) -> list[str]:
    """Lines of Python that load an adapter beside a base of this origin."""
    model = origin.get("repo", "PATH OF THE BASE")
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model}", dtype="auto"), "PATH")',
    ]


def front_matter(card: str) -> str:
    """That of a model card; empty if it has none."""
    match = _MATTER.match(card.replace("\r\n", "\n"))
    return match[1] if match else ""


def _step_section(step: PlannedStep, patch: Patch) -> list[str]:
    lines = ["", f"## {step.id}", "", *(f"- {note}" for note in patch.notes)]
    numbers: Mapping[str, Any] = {
        name: value for name, value in patch.metrics.items() if isinstance(value, int | float | str)
    }
    return lines + [
        f"- {name}: {value:.6g}" if isinstance(value, float) else f"- {name}: {value}"
        for name, value in numbers.items()
    ]


def usage(needs_code: bool) -> list[str]:
    """Lines of Python that load an output; `needs_code`: its model is code of its own."""
    argument = ", trust_remote_code=True" if needs_code else ""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{argument})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
    ]
