"""Small data, and a `lofit` step checked, planned and applied as a recipe does."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.host import host
from regraft.core.patch import Outline, Patch
from regraft.core.residual_bias import HeadOffset
from regraft.core.sources.folder import open_folder
from regraft.core.tensors import MemoryTensor
from regraft.core.transformation import Run

ANIMALS = ("cat", "dog", "owl", "bee")


def rows(count: int = 16, *, pairs: bool = False, seed: int = 0) -> list[dict[str, str]]:
    """Questions whose lengths differ, with an answer, or with one that is preferred: the first by the alphabet."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        prompt = f"Q{draw.randrange(10 ** draw.randrange(1, 6))}:"
        one, other = sorted(draw.sample(ANIMALS, 2))
        found.append({"prompt": prompt, **({"chosen": one, "rejected": other} if pairs else {"completion": one})})
    return found


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@dataclass
class Done:
    """What a step did."""

    checkpoint: Checkpoint
    outline: Outline
    patch: Patch
    told: list[str] = field(default_factory=list)

    @property
    def heads(self) -> list[tuple[int, int]]:
        return [tuple(head) for head in json.loads(self.patch.reports["heads.json"].read())["heads"]]

    @property
    def vectors(self) -> dict[str, Any]:
        from safetensors.torch import load

        return load(self.patch.reports["offsets.safetensors"].read())

    @property
    def losses(self) -> list[float]:
        lines = self.patch.reports["losses.jsonl"].read().decode().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def offsets(self) -> list[HeadOffset]:
        """The learnt offsets, from the report alone."""
        found = []
        for name, vector in self.vectors.items():
            _, layer, kind, unit = name.split(".")
            site = "head" if kind == "heads" else "kv-group"
            found.append(HeadOffset(int(layer), int(unit), MemoryTensor(name, vector), site))  # type: ignore[arg-type]
        return found


def lofit(base: Path | Checkpoint, data: Path | dict[str, Any], *, run: Run | None = None, **values: Any) -> Done:
    """Check, plan and apply; `task` is sft, in fp32, unless `values` say otherwise."""
    checkpoint = base if isinstance(base, Checkpoint) else open_folder(base, label="base")
    step = host().transformations()["lofit"]()
    source = data if isinstance(data, dict) else str(data)
    given = {"task": "sft", "data": source, "precision": "float32", **values}
    params = step.Params.model_validate(given)
    told: list[str] = []
    run = run or Run("lofit", tell=told.append)
    step.check(checkpoint, params)
    outline = step.plan(checkpoint, params)
    patch = step.apply(checkpoint, params, run)
    assert outline.deviations(patch) == []
    return Done(checkpoint, outline, patch, told)
