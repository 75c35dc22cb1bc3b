"""Weights and changes for the tests of quantisation."""

from regraft.core.low_rank import LowRankDelta
from regraft.core.tensors import LazyTensor, MemoryTensor

METHODS = ("nf4", "int8")


class Opaque(LazyTensor):
    """A tensor that does not tell where it comes from, and perhaps can only be had whole."""

    def __init__(self, tensor, *, row_local=True):
        self.spec, self.tensor, self.local, self.computed = tensor.spec, tensor, row_local, 0

    @property
    def row_local(self):
        return self.local

    def open(self, device="cpu"):
        read = self.tensor.open(device)

        def counted(start, stop):
            assert self.local or (start, stop) == (0, self.spec.rows)
            self.computed += 1
            return read(start, stop)

        return counted


def delta(name, rows, columns, size=1.0, rank=4):
    """A low-rank delta whose entries are about `size`."""
    import torch

    generator = torch.Generator().manual_seed(rows + columns)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return LowRankDelta(name, MemoryTensor("l", left), MemoryTensor("r", right), size / rank**0.5)
