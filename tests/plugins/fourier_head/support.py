"""Models with the head, made from the tiny families and loaded as a user loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Outline, Patch, overlay
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.fourier_head import FourierHead
from tests.families import save_tiny
from tests.materialise import materialise

START, BINS = 20, 10
"""Ids of the characters 0 to 9 in the tokenizer of the tiny families."""


def params(**values: Any) -> Any:
    given = {"num_frequencies": 4, **values}
    if not {"tokens", "ids", "pattern", "bins"} & set(given) and given.get("mode") != "replace":
        given["tokens"] = "0..9"
    return FourierHead.Params(**given)


def planned(checkpoint: Checkpoint, **values: Any) -> Outline:
    """Check and plan; the command line does no more before it runs."""
    step, given = FourierHead(), params(**values)
    step.check(checkpoint, given)
    return step.plan(checkpoint, given)


def applied(checkpoint: Checkpoint, run: Run | None = None, **values: Any) -> tuple[Checkpoint, Patch]:
    """The checkpoint with its head; the patch keeps the plan's word."""
    outline = planned(checkpoint, **values)
    patch = FourierHead().apply(checkpoint, params(**values), run or Run("head"))
    assert outline.deviations(patch) == []
    return overlay(checkpoint, patch, by="head"), patch


def opened(folder: Path | str) -> Checkpoint:
    return open_folder(Path(folder), label=Path(folder).name)


def base(folder: Path, family: str = "llama", **options: Any) -> Checkpoint:
    return open_folder(save_tiny(family, folder, tokenizer=True, **options), label=family)


def export(checkpoint: Checkpoint, folder: Path, **values: Any) -> Any:
    """The model of the written folder, through its own code."""
    after, _ = applied(checkpoint, **values)
    return load(materialise(after, folder))


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def stock(checkpoint: Checkpoint) -> Any:
    """The model before."""
    return Run("before").model(checkpoint)


def token_ids(rows: int = 3, length: int = 12, seed: int = 0) -> Any:
    import torch

    return torch.randint(4, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def change_json(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
