"""Resized axes: closed forms, exact halves, the same bits however the rows are cut, and saved formulas."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.errors import PluginError
from regraft.core.operations import ComputedTensor
from regraft.core.shape_operations import Constant, Resize, Span
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from tests.checkpoints import bits

CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
HALVES = (Span(5, 1, half="first"), Span(5, 1, half="second"))


def weights(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def result(operation, tensor, step=None):
    """The computed tensor, read whole or `step` rows at a time."""
    spec = TensorSpec("x", CODES[tensor.dtype], operation.shape(tensor.shape))
    computed = ComputedTensor(spec, operation, (MemoryTensor("x", tensor),))
    step = step or spec.rows
    read = computed.open()
    return torch.cat([read(start, min(start + step, spec.rows)) for start in range(0, spec.rows, step)])


def test_spans_are_joined_filled_and_scaled_along_each_axis():
    x = weights(4, 6)
    rows = (Span(2, 1), Span(1), Span(1, 0, 0.5))
    columns = (Span(6, 0), Span(2, 3))
    wide = torch.cat([x, x[:, 3:5]], 1)
    expected = torch.cat([wide[1:3], torch.full((1, 8), 3.0), wide[:1] * 0.5])
    assert torch.equal(result(Resize("x", {0: rows, 1: columns}, fill=3.0), x), expected)


def test_a_norm_that_stores_w_minus_one_is_scaled_as_w():
    x = weights(4, dtype=torch.float64)
    found = result(Resize("x", {0: (Span(4, 0, 0.5), Span(2))}, offset=1.0), x)
    torch.testing.assert_close(found, torch.cat([(x + 1) / 2 - 1, x.new_zeros(2)]), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("axis", [0, 1])
def test_halves_sum_to_the_element_exactly(dtype, axis):
    shape = (8, 6, 3) if axis else (6, 8, 3)
    x = weights(*shape, dtype=dtype)
    both = result(Resize("x", {axis: HALVES}, noise=0.5, seed=3), x)
    first, second = both.split(5, axis)
    source = x.narrow(axis, 1, 5)
    assert torch.equal(first.double() + second.double(), source.double())
    share = (first.double() / source.double()).flatten()
    assert share.min() < 0.1
    assert share.max() > 0.9
    even = result(Resize("x", {axis: HALVES}), x)
    assert torch.equal(even, torch.cat([source / 2] * 2, axis))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**40))
def test_the_bits_do_not_depend_on_how_rows_are_cut(step, seed):
    x = weights(9, 6, dtype=torch.bfloat16)
    operation = Resize("x", {1: (*HALVES, Span(2))}, noise=0.25, seed=seed)
    assert operation.row_local
    assert bits(result(operation, x, step)) == bits(result(operation, x))


def test_shares_are_drawn_evenly_and_anew_for_every_place_and_seed():
    x = torch.ones(200, 100, dtype=torch.float64)
    one, other = (
        result(Resize("x", {1: (Span(100, 0, half="first"),)}, noise=0.5, seed=seed), x)[:, :100] for seed in (0, 1)
    )
    for drawn in (one, other):
        assert drawn.unique().numel() > 19_990
        assert abs(drawn.mean() - 0.5) < 0.01
        assert abs(drawn.var() - 1 / 12) < 0.003, "uniform in [0, 1)"
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([one[:, 1:].flatten(), one[:, :-1].flatten()]))[0, 1]) < 0.03


def test_the_formula_survives_json():
    operation = Resize("x", {1: (*HALVES, Span(2)), 0: (Span(3, 0, 0.5),)}, 1.0, 1.0, 0.25, 7)
    assert Resize.restore(("x",), json.loads(json.dumps(operation.parameters)), {}) == operation
    constant = Constant((2, 3), 0.5)
    assert Constant.restore((), json.loads(json.dumps(constant.parameters)), {}) == constant
    assert torch.equal(constant.prepare("cpu")(0, 1), torch.full((1, 3), 0.5))


@pytest.mark.parametrize("span", [[-1, 0, 1.0, ""], [1, -1, 1.0, ""], [1, 0, 1.0, "third"]])
def test_a_span_that_cannot_be_is_no_formula(span):
    parameters = {**Resize("x", {0: (Span(1, 0),)}).parameters, "axes": {"0": [span]}}
    with pytest.raises(ValueError, match="no span"):
        Resize.restore(("x",), parameters, {})


def test_a_span_behind_the_end_is_refused():
    with pytest.raises(PluginError, match="ends behind its axis"):
        result(Resize("x", {0: (Span(5, 0),)}), weights(4, 2))
