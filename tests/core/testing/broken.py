"""Transformations with one fault each, and the check that finds it. What they have in common is right."""

import itertools
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import BaseModel, Field

from regraft import (
    Edit,
    FileRef,
    MemoryTensor,
    Operation,
    Params,
    Patch,
    ScaleRows,
    Transformation,
    Unsupported,
    Value,
    WeightSpace,
)
from regraft.core.patch import Outline
from regraft.testing import NotApplicable

NAMES = ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight")


@dataclass(frozen=True)
class Twice(Operation):
    inputs: tuple[str, ...] = ()
    factor: float = 2.0

    def prepare(self, device):
        return lambda start, stop, rows: rows.float() * self.factor


class SoundParams(Params):
    factor: float = Field(2.0, description="What tensors are multiplied by.")


class Sound(WeightSpace):
    """Scales two tensors of a llama, as it should be done."""

    name, summary = "toy-sound", "Scale two tensors."
    Params = SoundParams
    operation: type[Operation] = Twice

    def names(self, checkpoint):
        missing = [name for name in NAMES if name not in checkpoint.specs]
        if missing:
            raise Unsupported("a tensor is missing", where=missing[0], remedy="take a llama")
        return NAMES

    def patch(self, checkpoint, params):
        edits = {
            name: Edit(checkpoint.specs[name], self.operation((name,), params.factor))
            for name in self.names(checkpoint)
        }
        return Patch(edits=edits, metrics={"tensors": len(edits)}, notes=("two tensors scaled",))


class NeedingParams(Params):
    needed: int = Field(description="Has no default, and there is no example.")


class WithoutExample(Sound):
    name, Params = "toy-without-example", NeedingParams


class WithoutPackage(Sound):
    name = "toy-without-package"

    @classmethod
    def example(cls, checkpoint, folder):
        raise NotApplicable("it needs nothing-like-it, which is not installed")


class BareParams(Params):
    factor: float = 2.0


class Undescribed(Sound):
    name, Params = "toy-undescribed", BareParams


class LooseParams(BaseModel):
    model_config = {"frozen": True}
    factor: float = Field(2.0, description="What tensors are multiplied by.")


class Loose(Sound):
    name, Params = "toy-loose", LooseParams


class ChangingParams(Params):
    factor: float = Field(default_factory=itertools.count(1).__next__, description="Another one each time.")


class Changing(Sound):
    name, Params = "toy-changing", ChangingParams


class Counting(Sound):
    name, count = "toy-counting", itertools.count()

    def plan(self, checkpoint, params):
        return replace(super().plan(checkpoint, params), workspace_bytes=next(self.count))


class Peeking(Sound):
    name = "toy-peeking"

    def plan(self, checkpoint, params):
        first = checkpoint.load(NAMES[0]).flatten()[0].item()
        return replace(super().plan(checkpoint, params), scratch_bytes=int(abs(first) * 1e6))


class Unplanned(Sound):
    name = "toy-unplanned"

    def plan(self, checkpoint, params):
        patch = self.patch(checkpoint, params)
        return Outline.of(replace(patch, edits={NAMES[0]: patch.edits[NAMES[0]]}))


class Scribbling(Sound):
    name = "toy-scribbling"

    def apply(self, checkpoint, params, run):
        (checkpoint.files["config.json"].path.parent / "seen.txt").write_text("seen")
        return super().apply(checkpoint, params, run)


class Damaging(Sound):
    name = "toy-damaging"

    def apply(self, checkpoint, params, run):
        place = checkpoint.raw("model.norm.weight")
        with place.path.open("r+b") as file:
            file.seek(place.offset)
            file.write(bytes(4))
        return super().apply(checkpoint, params, run)


class Rewriting(Sound):
    name = "toy-rewriting"

    def patch(self, checkpoint, params):
        config = checkpoint.files["config.json"].read().replace(b'"eos_token_id": 2', b'"eos_token_id": 3')
        return replace(super().patch(checkpoint, params), files={"config.json": FileRef(data=config)})


class Dropping(Sound):
    name = "toy-dropping"

    def patch(self, checkpoint, params):
        return replace(super().patch(checkpoint, params), dropped={"tokenizer_config.json": "not needed"})


class Widening(Sound):
    name = "toy-widening"

    def patch(self, checkpoint, params):
        edits = super().patch(checkpoint, params).edits
        return Patch(
            edits={name: Edit(replace(edit.spec, dtype="F32"), edit.operation) for name, edit in edits.items()}
        )


class FirstShard(Sound):
    name = "toy-first-shard"

    def names(self, checkpoint):
        first = min(checkpoint.shards.values())
        return [name for name, shard in checkpoint.shards.items() if shard == first and name.endswith("proj.weight")]


class Head(Sound):
    name = "toy-head"

    def names(self, checkpoint):
        return [checkpoint.specs["lm_head.weight"].name]


class Telling(Sound):
    name = "toy-telling"

    def patch(self, checkpoint, params):
        where = checkpoint.files["config.json"].path
        return replace(super().patch(checkpoint, params), notes=(f"read {where}",))


class PathParams(Params):
    table: str = Field(description="A file, as text.")


class Unrecorded(Sound):
    name, Params = "toy-unrecorded", PathParams

    @classmethod
    def example(cls, checkpoint, folder):
        (folder / "table.txt").write_text("2.0")
        return {"table": str(folder / "table.txt")}

    def patch(self, checkpoint, params):
        return super().patch(checkpoint, SoundParams(factor=float(Path(params.table).read_text())))


class Rambling(Sound):
    name = "toy-rambling"

    def patch(self, checkpoint, params):
        return replace(super().patch(checkpoint, params), notes=("one\ntwo",))


class Adding(Sound):
    name = "toy-adding"

    def patch(self, checkpoint, params):
        spec = replace(checkpoint.specs[NAMES[0]], name="model.layers.0.self_attn.r_proj.weight")
        return Patch(edits={spec.name: Edit(spec, Twice((NAMES[0],)))})


class Exploding(Sound):
    name = "toy-exploding"

    def patch(self, checkpoint, params):
        name = "lm_head.weight"
        return Patch(edits={name: Edit(checkpoint.specs[name], Twice((name,), 1e38))})


class Lookup(Sound):
    name = "toy-lookup"

    def names(self, checkpoint):
        return {"llama": NAMES}[checkpoint.config["model_type"]]


class Trusting(Sound):
    name = "toy-trusting"

    def names(self, checkpoint):
        if checkpoint.config["model_type"] != "llama":
            raise Unsupported("is no llama", remedy="take a llama")
        return NAMES


@dataclass(frozen=True)
class AddMask(Operation):
    inputs: tuple[str, ...] = ()
    factor: float = 2.0
    row_local = False

    def prepare(self, device):
        import torch

        return lambda start, stop, rows: rows + torch.ones(64, 64)


class Rigid(Sound):
    name, operation = "toy-rigid", AddMask


@dataclass(frozen=True)
class Noise(Operation):
    inputs: tuple[str, ...] = ()
    factor: float = 2.0

    def prepare(self, device):
        import torch

        return lambda start, stop, rows: rows + torch.randn_like(rows)


class Noisy(Sound):
    name, operation = "toy-noisy", Noise


class Meddling(Sound):
    name = "toy-meddling"

    def apply(self, checkpoint, params, run):
        os.environ["TOY_MEDDLING"] = "1"
        return super().apply(checkpoint, params, run)


class Remembering(Sound):
    name, seen = "toy-remembering", itertools.count(1)

    def apply(self, checkpoint, params, run):
        return super().apply(checkpoint, SoundParams(factor=float(next(self.seen))), run)


@dataclass(frozen=True)
class Once(Operation):
    inputs: tuple[str, ...] = ()
    factor: float = 2.0
    used: list[bool] = field(default_factory=list, compare=False)

    def prepare(self, device):
        if self.used:
            raise RuntimeError("the stream is at its end")
        self.used.append(True)
        return lambda start, stop, rows: rows.float() * self.factor


class OneShot(Sound):
    name, operation = "toy-one-shot", Once


class Stored(Sound):
    name = "toy-stored"

    def names(self, checkpoint):
        return [name for name in super().names(checkpoint) if checkpoint.raw(name).nbytes]


class Impostor(ScaleRows):
    """Computes something else than the formula that its `kind` stands for."""

    def prepare(self, device):
        return lambda start, stop, rows: rows.float() * 3


class Disguised(Sound):
    name = "toy-disguised"

    def patch(self, checkpoint, params):
        import torch

        specs = [checkpoint.specs[name] for name in self.names(checkpoint)]
        factors = MemoryTensor("factors", torch.ones(64))
        return Patch(edits={spec.name: Edit(spec, Impostor(spec.name, factors)) for spec in specs})


class Hashing(Sound):
    name = "toy-hashing"

    def patch(self, checkpoint, params):
        return super().patch(checkpoint, SoundParams(factor=1.0 + hash("factor") % 97))


class Unordered(Sound):
    name = "toy-unordered"

    def apply(self, checkpoint, params, run):
        names = " ".join({f"name-{index}" for index in range(20)})
        return replace(super().apply(checkpoint, params, run), reports={"names.txt": FileRef(data=names.encode())})


class Littering(Sound):
    name = "toy-littering"

    def apply(self, checkpoint, params, run):
        Path("debug.log").write_text("here I was")
        return super().apply(checkpoint, params, run)


class Drawing(Transformation):
    """Works by itself, as a training does, so that `regraft apply` would keep its result and draw only once."""

    name, summary, Params = "toy-drawing", "Scale two tensors by a number that nobody knows before.", SoundParams

    def check(self, checkpoint, params):
        Sound().names(checkpoint)

    def plan(self, checkpoint, params):
        return replace(Sound().plan(checkpoint, params), workspace_bytes=10**7)

    def apply(self, checkpoint, params, run):
        import torch

        return Sound().patch(checkpoint, SoundParams(factor=1 + torch.rand(()).item() + hash("factor") % 97))


class Reserved(Sound):
    name = "output"


class Hoarding(Sound):
    name = "toy-hoarding"

    def patch(self, checkpoint, params):
        names = [name for name, spec in checkpoint.specs.items() if len(spec.shape) == 2]
        held = {name: MemoryTensor(name, checkpoint.load(name) * params.factor) for name in names}
        return Patch(edits={name: Edit(checkpoint.specs[name], Value(tensor)) for name, tensor in held.items()})
