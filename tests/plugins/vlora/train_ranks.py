"""Run by torchrun: both stages of `vlora-train` in every process; what each has learnt is left in a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from regraft.core.processes import processes
from regraft.core.sources.open import open_checkpoint
from regraft.plugins.vlora.train_own import OWN_WEIGHTS
from tests.plugins.vlora.train_support import learn, loaded, params


def both_stages(base: Path, lesson: Path) -> dict[str, Any]:
    """Losses and tensors of a first and a second stage; micro-batches of one, so that some show no picture."""
    ours, found = processes(), dict[str, Any]()
    checkpoint = open_checkpoint(base)
    for stage, new in (("generator", {}), ("both", {"new": None})):
        given = params(lesson, train=stage, micro_batch=1, lr=1e-3, **new)
        patch, checkpoint = learn(checkpoint, given, rank=ours.rank, world=ours.world)
        found[stage] = {
            "losses": patch.reports["losses.jsonl"].data,
            "weights": {**load(patch.files[OWN_WEIGHTS].data), **loaded(checkpoint)},
        }
    return found


if __name__ == "__main__":
    torch.save(both_stages(Path(sys.argv[1]), Path(sys.argv[2])), f"{sys.argv[3]}/{processes().rank}.pt")
    processes().part()
