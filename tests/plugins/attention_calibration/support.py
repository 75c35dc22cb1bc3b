"""An `attention-calibration` step checked, planned and applied as a recipe does, and models loaded from its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Patch, overlay
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.attention_calibration import AttentionCalibration, AttentionCalibrationParams
from tests.families import tiny
from tests.materialise import materialise

EASY = {"tau": 0.06, "min_queries": 2}
"""A threshold low enough for sinks in tiny random models."""


def calibrate(base: Path | Checkpoint, run: Run | None = None, **values: Any) -> Patch:
    """Check, plan and apply; the plan must say what the patch does."""
    checkpoint = base if isinstance(base, Checkpoint) else open_folder(base, label="base")
    step, params = AttentionCalibration(), AttentionCalibrationParams.model_validate(values)
    step.check(checkpoint, params)
    outline = step.plan(checkpoint, params)
    patch = step.apply(checkpoint, params, run or Run("act"))
    assert outline.deviations(patch) == []
    return patch


def export(base: Path, folder: Path, **values: Any) -> Path:
    """Calibrate the checkpoint in `base` and write the result to `folder`."""
    checkpoint = open_folder(base, label="base")
    return materialise(overlay(checkpoint, calibrate(checkpoint, **values), by="act"), folder)


def load(folder: Path, **options: Any) -> Any:
    """The model in `folder`, its code trusted."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True, "dtype": torch.float32, **options}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval().requires_grad_(False)


def stock(family: str, **overrides: Any) -> Any:
    """The base model itself."""
    return tiny(family, **overrides)


def token_ids(length: int, *, batch: int = 1, seed: int = 0) -> Any:
    """Ids [batch, length] that are no special tokens; one of them again and again, which draws attention somewhere."""
    import torch

    ids = torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 3::4] = 7
    return ids
