"""`regraft.lock.json`: what went in, what came out, and what did it; and the model card. No absolute path, no clock."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from regraft.core.checkpoint import Checkpoint
from regraft.core.layout import Layout
from regraft.core.patch import Patch
from regraft.core.plan import Plan, PlannedStep
from regraft.core.sources.folder import LOCK
from regraft.core.writer import WriteReport

LOCK_SCHEMA = 1
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "bitsandbytes", "gguf")


def lock_document(
    plan: Plan, patches: Sequence[Patch], written: WriteReport, output: Path, device: str
) -> dict[str, Any]:
    """The lock file of a finished run.

    Args:
        plan: what was planned.
        patches: what each step returned.
        written: digests that the writer took.
        output: the folder as written, whose other files are hashed here.
        device: class of device that computed, `cpu` or `cuda`.
    """
    weights = set(plan.layout.files)
    return {
        "schema": LOCK_SCHEMA,
        "regraft": package_version("regraft"),
        "recipe": plan.recipe.resolved(),
        "base": _base(plan, written),
        "steps": [_step(step, patch) for step, patch in zip(plan.steps, patches, strict=True)],
        "output": {
            "tensors": _tensors(plan.layout, written),
            "files": {
                path.relative_to(output).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
                for path in sorted(output.rglob("*"))
                if path.is_file() and path.name not in weights and path.name != LOCK
            },
            "left_behind": dict(sorted(plan.result.left_behind.items())),
        },
        "non_finite_inputs": {name: vars(count) for name, count in sorted(written.non_finite.items())},
        "environment": environment(device),
    }


def environment(device: str) -> dict[str, Any]:
    """Versions of what computes, and the kind of machine."""
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "device": device.split(":")[0],
    }


def package_version(name: str) -> str | None:
    """The installed version of a package; the package is not imported."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _base(plan: Plan, written: WriteReport) -> dict[str, Any]:
    base = plan.base
    copied = {name: written.digests.get(name) for name in plan.changes["copied"]}
    inputs = {**copied, **written.input_digests}
    return {
        "model": plan.recipe.resolved()["base"]["model"],
        **base.origin,
        "digest": base.digest,
        "tensors": {name: inputs[name] for name in base.specs if inputs.get(name)},
    }


def _step(step: PlannedStep, patch: Patch) -> dict[str, Any]:
    kind = type(step.transformation)
    return {
        "id": step.id,
        "use": kind.name,
        "version": kind.version,
        "plugin": kind.__module__.split(".")[0],
        "plugin_version": package_version(kind.__module__.split(".")[0]),
        "data": data_digests(step.params),
        "metrics": dict(patch.metrics),
        "notes": list(patch.notes),
    }


def data_digests(params: BaseModel) -> dict[str, Any]:
    """SHA-256 of every file that a parameter of type Path names, by parameter; a folder's files by relative path."""
    digests: dict[str, Any] = {}
    for name in type(params).model_fields:
        value = getattr(params, name)
        if isinstance(value, Path) and value.is_file():
            digests[name] = sha256(value)
        elif isinstance(value, Path) and value.is_dir():
            files = sorted(path for path in value.rglob("*") if path.is_file())
            digests[name] = {path.relative_to(value).as_posix(): sha256(path) for path in files}
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


def model_card(plan: Plan, patches: Sequence[Patch], result: Checkpoint) -> bytes:
    """README.md of the output: front matter that hubs read, then what was done in which order."""
    base, recipe = plan.recipe.base, plan.recipe
    front = ["---", "library_name: transformers", "tags:", "- regraft"]
    if plan.base.origin.get("source") == "hub":
        front += [f"base_model: {base.model}"]
    lines = [*front, "---", "", f"# {recipe.name}", "", f"Written by regraft from `{base.model}`."]
    lines += ["", "| step | transformation | source |", "|---|---|---|"]
    lines += [
        f"| {step.id} | {step.transformation.summary} | {step.transformation.paper or '-'} |" for step in plan.steps
    ]
    for step, patch in zip(plan.steps, patches, strict=True):
        lines += _step_section(step, patch)
    needs_code = any("auto_map" in patch.json.get("config.json", {}) for patch in patches)
    lines += ["", "## Use", "", *_usage(needs_code)]
    if "README.base.md" in result.files:
        lines += ["", "The card of the base is in `README.base.md`; its licence applies."]
    lines += ["", f"Every digest, version and parameter is in `{LOCK}`; `regraft verify` recomputes them."]
    return ("\n".join(lines) + "\n").encode()


def _step_section(step: PlannedStep, patch: Patch) -> list[str]:
    lines = ["", f"## {step.id}", "", *(f"- {note}" for note in patch.notes)]
    numbers: Mapping[str, Any] = {
        name: value for name, value in patch.metrics.items() if isinstance(value, int | float | str)
    }
    return lines + [
        f"- {name}: {value:.6g}" if isinstance(value, float) else f"- {name}: {value}"
        for name, value in numbers.items()
    ]


def _usage(needs_code: bool) -> list[str]:
    argument = ", trust_remote_code=True" if needs_code else ""
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("PATH"{argument})',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
    ]
