"""Checkpoints for the tests of the writer, with edits of every kind."""

from dataclasses import dataclass, replace

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.layout import lay_out
from regraft.core.operations import Convert, Operation, ScaleRows, Value
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from regraft.core.writer import WriteOptions, Writer

QUICK = WriteOptions(threads=2, durable=False)


def tensors():
    """Some small, one of several chunks, one empty, one scalar, of many dtypes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(3000, 250, generator=generator),
        "a": torch.randn(40, 30, generator=generator).bfloat16(),
        "b": torch.randn(7, 3, 5, generator=generator).half(),
        "norm": torch.randn(40, generator=generator),
        "ids": torch.arange(1000, dtype=torch.int32),
        "codes": torch.arange(255, dtype=torch.uint8).reshape(5, 51),
        "mask": torch.tensor([True, False]),
        "scale": torch.tensor(3.0),
        "nothing": torch.zeros(0, 4),
    }


@dataclass(frozen=True)
class Flip(Operation):
    """The rows in reverse: needs the whole input. As an operation of a stranger it has no kind."""

    input: str
    row_local = False

    @property
    def inputs(self):
        return (self.input,)

    def prepare(self, device):
        return lambda start, stop, rows: rows.flip(0)


def changed(base):
    """Every kind of edit at once."""
    factors = MemoryTensor("factors", torch.linspace(0.5, 2, 3000))
    patch = Patch(
        edits={
            "embed": Edit(replace(base.specs["embed"], dtype="BF16"), ScaleRows("embed", factors)),
            "a": Edit(replace(base.specs["a"], dtype="F16"), Convert("a")),
            "b": Edit(base.specs["b"], Flip("b")),
            "new": Edit(TensorSpec("new", "F32", (2, 2)), Value(MemoryTensor("v", torch.ones(2, 2)))),
        },
        removals=frozenset({"mask"}),
        renames={"moved": "ids"},
    )
    return overlay(base, patch, by="s")


def write(checkpoint, folder, options=QUICK, *, shard_bytes=1 << 30, progress=lambda nbytes: None):
    return Writer(folder, options, progress).write(lay_out(checkpoint, shard_bytes))


def in_memory(**values):
    return Checkpoint("m", {name: MemoryTensor(name, value) for name, value in values.items()}, {})


def edited(checkpoint, name, operation, **spec):
    return overlay(checkpoint, Patch(edits={name: Edit(replace(checkpoint.specs[name], **spec), operation)}), by="s")


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
