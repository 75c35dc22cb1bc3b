"""A step that changes something of everything and counts its calls, for the tests of the step cache."""

import os
from pathlib import Path

from regraft.core.checkpoint import FileRef
from regraft.core.data.settings import Data
from regraft.core.execute import ApplyOptions, Events, apply
from regraft.core.operations import Operation, ScaleRows, Value
from regraft.core.patch import Edit, Outline, Patch
from regraft.core.recipe.load import load_recipe
from regraft.core.recipe.references import OutputPath
from regraft.core.tensors import MemoryTensor
from regraft.core.transformation import Params, Transformation
from tests.plugin_host import host_with
from tests.running import recipe_text

NORM, HEAD, GATE = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"
RAN = []


class Negate(Operation):
    """-x; it has no kind, so that it is kept by its values."""

    inputs = (GATE,)

    def prepare(self, device):
        return lambda start, stop, rows: -rows.float()


class LearnParams(Params):
    factor: float = 2.0
    data: Data | None = None
    notes: Path | None = None
    log: OutputPath | None = None
    spoil: bool = False
    formulas: bool = False
    unrecorded: str = ""


class Learn(Transformation[LearnParams]):
    """Every way of changing a checkpoint: a value, a formula, an operation without a kind, a tensor carried through,
    JSON, files, reports; and it counts its calls."""

    name = "learn"
    summary = "Changes something of everything."
    Params = LearnParams

    def plan(self, checkpoint, params):
        names = (NORM, HEAD, "lm_head.weight") if params.formulas else (NORM, HEAD, GATE, "lm_head.weight")
        specs = {name: checkpoint.specs[name] for name in names if name in checkpoint.specs}
        return Outline(specs=specs, files={"extra.txt": 3}, json={"config.json": {"rope_theta": 7.0}},
                       workspace_bytes=1, unrecorded=params.unrecorded)  # fmt: skip

    def apply(self, checkpoint, params, run):
        import torch

        RAN.append(run.step)
        specs = checkpoint.specs
        fill = float("nan") if params.spoil else params.factor
        values = MemoryTensor(NORM, torch.full(specs[NORM].shape, fill) * checkpoint.load(NORM))
        factors = MemoryTensor("factors", torch.full((specs[HEAD].rows,), params.factor))
        edits = {
            NORM: Edit(specs[NORM], Value(values)),
            HEAD: Edit(specs[HEAD], ScaleRows(HEAD, factors)),
        }
        if not params.formulas:
            edits[GATE] = Edit(specs[GATE], Negate())
        if "lm_head.weight" in specs:
            edits["lm_head.weight"] = Edit(specs["lm_head.weight"], Value(checkpoint.tensor("lm_head.weight")))
        return Patch(
            edits=edits, json={"config.json": {"rope_theta": 7.0}}, files={"extra.txt": FileRef(data=b"abc")},
            metrics={"loss": 0.1, "pair": (1, 2.5)}, notes=("learnt",), reports={"loss.txt": FileRef(data=b"0.1\n")},
        )  # fmt: skip


HOST = host_with(Learn)
ONE, TWO, THREE = ({"use": "learn", "id": name} for name in ("one", "two", "three"))


def run(*steps, base="base", out="out", host=HOST, options=None, **output):
    """Apply; gives the ids of the steps that ran, and the lines that were told."""
    written = Path(f".{os.getpid()}.toml")  # another process may read r.toml just now
    written.write_text(recipe_text(base, *steps, path=out, **output))
    written.replace("r.toml")
    recipe = load_recipe(Path("r.toml"), (), host.transformations(), host.broken)
    RAN.clear()
    told = []
    options = options or ApplyOptions(device="cpu", durable=False, force=True)
    apply(recipe, Path(out), host, options, Events(say=told.append))
    return list(RAN), told


def no_cache():
    return ApplyOptions(device="cpu", durable=False, force=True, cache=False)
