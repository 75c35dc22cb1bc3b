"""Pruned matrices: exact counts, the entries that a stable sort names, and every other bit kept."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.operations import ComputedTensor
from regraft.core.sparse_operations import Sparsity, ZeroLowest, lowest, pruned, scores
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from tests.checkpoints import bits


def weights(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def result(operation, tensor, step=None):
    """The computed tensor, read whole or `step` rows at a time."""
    spec = TensorSpec("x", {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype], tuple(tensor.shape))
    read = ComputedTensor(spec, operation, (MemoryTensor("x", tensor),)).open()
    step = step or len(tensor)
    return torch.cat([read(start, min(start + step, len(tensor))) for start in range(0, len(tensor), step)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4), st.integers(0, 6))
def test_the_lowest_are_those_of_a_stable_sort(rows, count):
    values = torch.tensor(rows, dtype=torch.float32)
    expected = torch.zeros_like(values, dtype=torch.bool)
    expected.scatter_(1, values.argsort(dim=1, stable=True)[:, :count], True)
    assert torch.equal(lowest(values, count), expected)


def test_counts_are_exact_by_row_by_matrix_and_by_pattern():
    w, norm = weights(7, 24), weights(24, seed=1, dtype=torch.float32).abs()
    by_row = pruned(w, Sparsity(0.3), [norm])
    assert by_row.sum(1).tolist() == [int(24 * 0.3)] * 7
    kept = scores(w, norm).masked_fill(by_row, float("inf")).min(1).values
    assert (kept >= scores(w, norm).masked_fill(~by_row, 0).max(1).values).all()
    whole = pruned(w, Sparsity(0.3, whole=True))
    assert whole.sum() == int(7 * 24 * 0.3)
    assert len(set(whole.sum(1).tolist())) > 1
    assert w[~whole].abs().min() >= w[whole].abs().max()
    groups = pruned(w, Sparsity(keep=2, group=4), [norm]).view(7, 6, 4)
    assert (groups.sum(-1) == 2).all()
    for sparsity, mask in ((Sparsity(0.3), by_row), (Sparsity(0.3, whole=True), whole)):
        assert sparsity.count(7, 24) == mask.sum()
    assert Sparsity(keep=1, group=4).count(7, 24) == 7 * 18


def test_masks_of_several_norms_agree():
    w = weights(6, 40)
    norms = [weights(40, seed=seed, dtype=torch.float32).abs() for seed in (1, 2, 3)]
    each = [pruned(w, Sparsity(0.5), [norm]) for norm in norms]
    shared = pruned(w, Sparsity(0.5), norms)
    assert torch.equal(shared, each[0] & each[1] & each[2])
    assert 0 < shared.sum() < each[0].sum()


@pytest.mark.parametrize("step", [1, 3, 8])
def test_only_masked_entries_change_and_rows_may_be_cut(step):
    w, norm = weights(8, 16), weights(16, seed=1, dtype=torch.float32).abs()
    operation = ZeroLowest("x", Sparsity(0.5), (((1, 3), (5, 7)),), (MemoryTensor("n", norm),))
    assert operation.row_local
    found = result(operation, w, step)
    expected = w.clone()
    for run in (slice(1, 3), slice(5, 7)):
        expected[run] = w[run].masked_fill(pruned(w[run], Sparsity(0.5), [norm]), 0)
    assert bits(found) == bits(expected)


def test_a_matrix_of_several_runs_is_compared_as_one():
    w = weights(6, 8, dtype=torch.float32)
    operation = ZeroLowest("x", Sparsity(0.5, whole=True), (((0, 2), (4, 6)), ((2, 4),)))
    found = result(operation, w)
    assert not operation.row_local
    outer, inner = torch.cat([w[:2], w[4:]]), w[2:4]
    for part, old in ((torch.cat([found[:2], found[4:]]), outer), (found[2:4], inner)):
        assert torch.equal(part, old.masked_fill(pruned(old, Sparsity(0.5, whole=True)), 0))


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.5, whole=True), Sparsity(keep=2, group=4)])
def test_transposed_and_stacked_tensors_hold_the_same_matrices(sparsity):
    w = weights(6, 8)
    norms = () if sparsity.whole else (MemoryTensor("n", weights(8, seed=1, dtype=torch.float32).abs()),)
    plain = result(ZeroLowest("x", sparsity, (((0, 6),),), norms), w)
    turned = result(ZeroLowest("x", sparsity, (((0, 6),),), norms, transposed=True), w.T.contiguous())
    assert bits(turned.T) == bits(plain)
    other = weights(6, 8, seed=5)
    for step in (None,) if sparsity.whole else (1, 2):
        stacked = result(ZeroLowest("x", sparsity, (((0, 6),),), norms), torch.stack([w, other]), step)
        assert bits(stacked[0]) == bits(plain)
        assert bits(stacked[1]) == bits(result(ZeroLowest("x", sparsity, (((0, 6),),), norms), other))


def test_the_formula_survives_json():
    norm = MemoryTensor("n", torch.ones(8))
    operation = ZeroLowest("x", Sparsity(0.25, keep=1, group=2), (((0, 2), (4, 6)),), (norm, norm), transposed=True)
    parameters = json.loads(json.dumps(operation.parameters))
    assert ZeroLowest.restore(("x",), parameters, operation.operands) == operation
    with pytest.raises(ValueError, match="no sparsity"):
        ZeroLowest.restore(("x",), {**parameters, "ratio": 1.5}, {})
