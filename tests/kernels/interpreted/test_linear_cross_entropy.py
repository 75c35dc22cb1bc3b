"""The Triton kernels in the interpreter, which must be on before they are imported: they run by themselves."""

import itertools
import os

import pytest
import torch

from regraft.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs, reference
from tests.kernels.test_linear_cross_entropy import DTYPES, error, exact, operands, same

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="`nox -s kernels` sets TRITON_INTERPRET=1")

SHAPES = ((37, 19, 331), (64, 32, 256), (70, 33, 129), (1, 2, 5))
TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
"""E is rounded to the operands' dtype, and the gradients after it."""


@pytest.fixture(autouse=True)
def many_pieces(monkeypatch):
    """Several spans and several tiles in each, several blocks of the backward pass, the last ones incomplete."""
    from regraft.kernels import linear_cross_entropy_triton as fused

    monkeypatch.setattr(fused, "SPAN", 256)
    monkeypatch.setattr(fused, "MIN_BLOCK", 80)
    monkeypatch.setattr(fused, "MAX_BLOCK", 80)


def compare(ours, states, weight, bias, labels, dtype, **options):
    wide = exact(states, weight, bias)
    expected = reference(wide[0], wide[1], labels, bias=wide[2], **options)
    assert ours.dtype == torch.float32
    same(ours, expected, 1e-6)
    upstream = torch.rand(expected.shape, generator=torch.Generator().manual_seed(3)) + 0.1
    pairs = [(leaf, other) for leaf, other in zip((states, weight, bias), wide, strict=True) if leaf is not None]
    inputs = [leaf for leaf, _ in pairs]
    wanted = torch.autograd.grad(expected, [other for _, other in pairs], upstream.double())
    for gradient, other in zip(torch.autograd.grad(ours, inputs, upstream), wanted, strict=True):
        assert gradient.dtype == dtype
        same(gradient, other, TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, SHAPES)))
def test_forward_and_backward(dtype, shape):
    states, weight, labels, bias = operands(*shape, dtype, ignored=shape[0] > 1)
    for options in ({}, {"reduction": "none"}, {"softcap": 5.0, "logit_scale": 0.3}):
        for offsets in (None, bias):
            ours = linear_cross_entropy(states, weight, labels, bias=offsets, implementation="triton", **options)
            compare(ours, states, weight, offsets, labels, dtype, **options)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(DTYPES, 2)))
def test_mixed_dtypes(first, second):
    states, weight, labels, _ = operands(21, 19, 101, bias=False)
    states = states.detach().to(first).requires_grad_()
    weight = weight.detach().to(second).requires_grad_()
    wide = exact(states, weight, None)[:2]
    ours = linear_cross_entropy(states, weight, labels, implementation="triton")
    wanted = torch.autograd.grad(reference(*wide, labels), wide)
    for gradient, other, dtype in zip(
        torch.autograd.grad(ours, (states, weight)), wanted, (first, second), strict=True
    ):
        assert gradient.dtype == dtype
        same(gradient, other, TOLERANCE[dtype])


def test_frozen_operands():
    states, weight, labels, bias = operands(21, 19, 101)
    expected = torch.autograd.grad(reference(states, weight, labels, bias=bias), (states, weight, bias))
    for learning in range(3):
        leaves = [item.detach().requires_grad_(index == learning) for index, item in enumerate((states, weight, bias))]
        linear_cross_entropy(leaves[0], leaves[1], labels, bias=leaves[2], implementation="triton").backward()
        assert [leaf.grad is not None for leaf in leaves] == [index == learning for index in range(3)]
        same(leaves[learning].grad, expected[learning], 1e-6)


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 30.0])
def test_softcap_from_small_to_saturated(size):
    """Up to 0.15 the hyperbolic tangent is a series, above it a quotient; both signs."""
    states, weight, labels, _ = operands(21, 19, 101, bias=False)
    with torch.no_grad():
        states *= size
    wide = exact(states, weight, None)
    ours = linear_log_probs(states, weight, labels, softcap=2.0, implementation="triton")
    expected = -reference(*wide[:2], labels, softcap=2.0, reduction="none")
    assert error(ours, expected) < 3e-7
    gradient = torch.autograd.grad(ours.sum(), states)[0]
    same(gradient, torch.autograd.grad(expected.sum(), wide[0])[0], 5e-6)  # 1 - tanh² cancels


def test_large_logits():
    states, weight, labels, _ = operands(21, 19, 101, bias=False)
    ours = linear_cross_entropy(states, weight, labels, logit_scale=1000.0, implementation="triton")
    compare(ours, states, weight, None, labels, torch.float32, logit_scale=1000.0)


def test_small_gradients_survive_fp16_with_a_loss_scale():
    """1 / tokens would make most of E fall below fp16's range, 65536 / tokens would make some of it overflow later."""
    states, weight, labels, _ = operands(200, 8, 100, torch.float16, bias=False)
    wide = exact(states, weight, None)[:2]
    for scale in (1.0, 4096.0):
        ours = linear_cross_entropy(states, weight, labels, implementation="triton") * scale
        expected = torch.autograd.grad(reference(*wide, labels) * scale, wide)
        tolerance = TOLERANCE[torch.float16] if scale > 1 else 2e-3
        for gradient, wanted in zip(torch.autograd.grad(ours, (states, weight)), expected, strict=True):
            same(gradient, wanted, tolerance)


def test_columns_ruled_out_by_an_infinite_bias():
    states, weight, labels, bias = operands(21, 19, 301)
    with torch.no_grad():
        bias[:280] = -torch.inf
    labels[labels >= 0] = 290
    ours = linear_cross_entropy(states, weight, labels, bias=bias, implementation="triton")
    compare(ours, states, weight, bias, labels, torch.float32)


def test_zero_upstream_gives_zero():
    states, weight, labels, _ = operands(21, 19, 101, bias=False)
    ours = linear_cross_entropy(states, weight, labels, implementation="triton")
    for gradient in torch.autograd.grad(ours * 0.0, (states, weight)):
        assert (gradient == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_that_counts(reduction):
    states, weight, labels, _ = operands(6, 5, 7, bias=False)
    labels[:] = -100
    ours = linear_cross_entropy(states, weight, labels, reduction=reduction, implementation="triton")
    plain = reference(states, weight, labels, reduction=reduction)
    assert torch.equal(ours.nan_to_num(nan=-1.0), plain.nan_to_num(nan=-1.0))
    for gradient in torch.autograd.grad(ours.sum(), (states, weight)):
        assert (gradient == 0).all()


def test_no_grad_and_strided_operands():
    states, weight, labels, _ = operands(21, 19, 101, bias=False)
    expected = reference(states, weight, labels)
    turned = [item.detach().T.contiguous().T for item in (states, weight)]
    with torch.no_grad():
        same(linear_cross_entropy(*turned, labels, implementation="triton"), expected, 1e-6)
