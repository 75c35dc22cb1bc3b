"""Checks that stock transformers loads what was written, and computes with it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from regraft.core.sources import open_checkpoint
from regraft.core.testing.conformance.check import demand, named
from regraft.core.testing.conformance.subject import Subject
from regraft.core.verify.load import IGNORED, verify_load


def loads_in_transformers(subject: Subject) -> None:
    """Stock transformers loads every output without a missing, unknown or misshapen tensor."""
    for family in subject.families:
        folder = subject.applied(family).folder
        if _brings_code(folder):
            verify_load(folder, "load", trust=subject.kind.own_code)
            continue
        _, info = _loaded(folder)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            wrong = [name for name in map(str, info.get(kind) or ()) if not name.endswith(IGNORED)]
            demand(not wrong, f"stock transformers finds {kind.replace('_', ' ')}", where=family, found=named(wrong),
                   remedy="write the tensors that the class of config.json has, and no others")  # fmt: skip


def computes_finite_numbers(subject: Subject) -> None:
    """The model that was written gives finite outputs on every family."""
    import torch

    for family in subject.families:
        folder = subject.applied(family).folder
        if _brings_code(folder):
            verify_load(folder, "forward", trust=subject.kind.own_code)
            continue
        model, _ = _loaded(folder)
        ids = torch.arange(3, 19)[None] % model.config.get_text_config().vocab_size
        with torch.inference_mode():
            outputs = model(input_ids=ids)[0]
        demand(
            bool(torch.isfinite(outputs).all()),
            "the model's outputs are not finite",
            where=family,
            remedy="look at the size of the edited weights: in float16 everything beyond 65504 is infinite",
        )


def _brings_code(folder: Path) -> bool:
    return "auto_map" in open_checkpoint(str(folder)).config


@lru_cache(maxsize=8)
def _loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model in the class that config.json names, and what loading it told."""
    import transformers

    (name,) = open_checkpoint(str(folder)).config["architectures"]
    kind = getattr(transformers, name, None)
    demand(kind is not None, "stock transformers has no such class", where="config.json: architectures", found=name,
           remedy="name a stock class, or bring the code (auto_map)")  # fmt: skip
    assert kind is not None
    model, info = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    return model.eval(), info
