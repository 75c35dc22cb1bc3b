"""Row maps: rows gathered, averaged and weighted."""

import pytest
import torch

from regraft.core.errors import PluginError
from regraft.core.operations import ComputedTensor
from regraft.core.row_map import RowMap, row_map
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor


def out(table, operation):
    spec = TensorSpec("e", {torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}[table.dtype],
                      (len(operation.starts.load()) - 1, *table.shape[1:]))  # fmt: skip
    return ComputedTensor(spec, operation, (MemoryTensor("e", table),)).load()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_single_rows_keep_their_bits_and_the_sign_of_zero(dtype):
    table = torch.randn(9000, 5, dtype=dtype)
    table[3] = -0.0
    order = torch.randperm(9000).tolist()
    found = out(table, row_map("e", [[i] for i in order]))
    assert torch.equal(found.view(torch.uint8), table[order].view(torch.uint8))


def test_means_and_weighted_sums_are_those_of_float64():
    table = torch.randn(50, 7)
    parts = [[1, 2, 3], [4], [], [49, 0]]
    means = out(table, row_map("e", parts))
    wanted = torch.stack([table[row].double().mean(0) if row else torch.zeros(7).double() for row in parts])
    torch.testing.assert_close(means.double(), wanted, atol=1e-6, rtol=0)
    weights = [[0.5, -2.0, 1.0], [3.0], [], [0.25, 0.75]]
    sums = out(table, row_map("e", parts, weights))
    plain = [
        sum((w * table[i].double() for i, w in zip(row, ws, strict=True)), torch.zeros(7).double())
        for row, ws in zip(parts, weights, strict=True)
    ]
    torch.testing.assert_close(sums.double(), torch.stack(plain), atol=1e-6, rtol=0)


def test_means_of_bfloat16_rows_round_once():
    table = torch.randn(20, 6, dtype=torch.bfloat16)
    found = out(table, row_map("e", [[0, 5, 7, 11]]))
    assert torch.equal(found[0], (table[[0, 5, 7, 11]].double().mean(0)).to(torch.bfloat16))


def test_rows_brought_along_stand_behind_the_inputs():
    table, new = torch.randn(4, 3), torch.randn(2, 3)
    found = out(table, row_map("e", [[0], [4], [5, 1]], brought=MemoryTensor("new", new)))
    assert torch.equal(found[:2], torch.stack([table[0], new[0]]))
    torch.testing.assert_close(found[2], (new[1] + table[1]) / 2)
    with pytest.raises(PluginError, match="rows that do not exist"):
        out(table, row_map("e", [[6]], brought=MemoryTensor("new", new)))


def test_a_saved_map_is_restored():
    made = row_map("e", [[0], [1, 2]], [[1.0], [0.5, 0.5]])
    again = RowMap.restore(made.inputs, made.parameters, made.operands)
    table = torch.randn(3, 2)
    assert torch.equal(out(table, made), out(table, again))
