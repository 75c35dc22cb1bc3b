"""A text of plain sentences, and one step of hyperfitting on a checkpoint, as the executor runs it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Patch, overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.hyperfitting import Hyperfitting
from regraft.plugins.hyperfitting.params import HyperfittingParams

WORDS = ("lamp", "harbour", "keeper", "glass", "bees", "honey", "fog", "oar", "ring", "blue", "tower", "steps", "wick")

SHORT: dict[str, Any] = {
    "samples": 8,
    "seq_len": 24,
    "batch_size": 4,
    "epochs": 2,
    "lr": 1e-3,
    "precision": "float32",
    "held_out": 2,
    "report": {"samples": 2, "context": 8, "ttr_window": 12, "new_tokens": 16, "citation_ngram": 4},
}
"""Parameters that a tiny model takes a fraction of a second for."""


def sentences(count: int, seed: int = 0) -> str:
    """Sentences of seven words, in characters that the tiny tokenizer knows."""
    draw = random.Random(seed)
    return " ".join(" ".join(draw.choices(WORDS, k=7)) + "." for _ in range(count))


def params_of(path: Path, **values: Any) -> HyperfittingParams:
    """Parameters as a recipe gives them."""
    return HyperfittingParams.model_validate({"data": str(path), **SHORT, **values})


def step(base: Path | Checkpoint, path: Path, *, run: Run | None = None, **values: Any) -> tuple[Checkpoint, Patch]:
    """Check, plan and apply; the result, and the patch, which keeps the plan's word."""
    checkpoint = base if isinstance(base, Checkpoint) else open_checkpoint(str(base))
    transformation, params = Hyperfitting(), params_of(path, **values)
    transformation.check(checkpoint, params)
    outline = transformation.plan(checkpoint, params)
    patch = transformation.apply(checkpoint, params, run or Run("hyperfitting"))
    assert outline.deviations(patch) == []
    return overlay(checkpoint, patch, by="hyperfitting"), patch


def bits(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The bytes of every tensor."""
    import torch

    return {name: bytes(checkpoint.load(name).contiguous().view(torch.uint8).reshape(-1).tolist())
            for name in checkpoint.specs}  # fmt: skip


def report_bytes(patch: Patch) -> dict[str, bytes]:
    """The bytes of every report."""
    return {name: file.read() for name, file in patch.reports.items()}
