"""Data and one call of the step, for the tests of `fine-tune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.fine_tune import FineTune
from regraft.plugins.fine_tune.params import FineTuneParams


def rows(count: int = 16) -> list[dict[str, str]]:
    """Sums to answer."""
    return [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}"} for n in range(count)]


def pairs(count: int = 16) -> list[dict[str, str]]:
    return [{"prompt": f"{n}+{n}=", "chosen": f"{2 * n}", "rejected": "??"} for n in range(count)]


def texts(count: int = 16) -> list[dict[str, str]]:
    return [{"text": f"{n} and {n} are {2 * n}"} for n in range(count)]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def params(**values: Any) -> FineTuneParams:
    """Quick by default: four steps in fp32 at a high rate."""
    given = {"lr": 1e-2, "steps": 4, "epochs": 4, "batch_size": 4, **values}
    given["train"] = {"precision": "float32", **given.get("train", {})}
    return FineTuneParams.model_validate_json(json.dumps(given, default=str), strict=True)


def tune(folder: Path, *, state: Path | None = None, **values: Any):
    """Check, plan and apply; the patch keeps the plan's word. Gives checkpoint, patch, and the result."""
    checkpoint, given, step = open_checkpoint(folder), params(**values), FineTune()
    step.check(checkpoint, given)
    outline = step.plan(checkpoint, given)
    patch = step.apply(checkpoint, given, Run("tune", state=state))
    assert outline.deviations(patch) == []
    return checkpoint, patch, overlay(checkpoint, patch, by="tune")


def loaded(checkpoint: Any) -> dict[str, Any]:
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
