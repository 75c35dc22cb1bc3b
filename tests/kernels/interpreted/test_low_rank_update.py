"""The Triton kernel in the interpreter, which must be on before the kernel is imported: they run by themselves."""

import itertools
import os

import pytest
import torch

from regraft.kernels.low_rank_update import low_rank_update, reference
from tests.kernels.test_low_rank_update import ALIGNED, DTYPES, ODD, operands

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="`nox -s kernels` sets TRITON_INTERPRET=1")


@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, (ALIGNED, ODD))))
def test_rounds_like_the_reference(dtype, shape):
    """Integers whose sums are exact in any order, half of them halfway between two bf16 numbers: the same bits."""
    rows, cols, rank = shape
    generator = torch.Generator().manual_seed(2)
    left = torch.randint(-8, 9, (rows, rank), generator=generator).float()
    right = torch.randint(-8, 9, (rank, cols), generator=generator).float()
    weight = torch.randint(-1000, 1001, (rows, cols), generator=generator).to(dtype)
    ours = low_rank_update(weight, left, right, 0.5, implementation="triton")
    assert ours.dtype == dtype
    assert torch.equal(ours, reference(weight, left, right, 0.5))


@pytest.mark.parametrize(("dtype", "factors"), list(itertools.product(DTYPES, DTYPES)))
def test_any_factors(dtype, factors):
    for shape in (ALIGNED, ODD, (70, 66, 33), (1, 3, 1)):
        weight, left, right = operands(*shape, dtype, factors)
        ours = low_rank_update(weight, left, right, 0.3, implementation="triton")
        exact = weight.double() + 0.3 * (left.double() @ right.double())
        unit = torch.finfo(dtype).eps * exact.abs().clamp_min(1.0)
        assert not ours.isnan().any()
        assert ((ours.double() - exact).abs() <= 0.5 * unit + 1e-5).all()
        if dtype != torch.float32:  # sums in another order differ by less than a rounding, so almost nowhere
            assert (ours != reference(weight, left, right, 0.3)).float().mean() < 0.01


def test_scale_is_rounded_before_the_sum():
    """s·P and the sum are rounded one after the other; a fused multiply-add would give other bits."""
    weight, left, right = torch.full((4, 4), -0.1), torch.full((4, 1), 1.1), torch.full((1, 4), 1.0)
    expected = reference(weight, left, right, 0.1)
    fused = (weight.double() + float(torch.tensor(0.1)) * left.double() @ right.double()).float()
    assert not torch.equal(expected, fused)
    assert torch.equal(low_rank_update(weight, left, right, 0.1, implementation="triton"), expected)


def test_special_values():
    """Without subnormal numbers: the interpreter's conversion of bf16 to fp32 drops them."""
    weight = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.4e38, -0.0, 1e-30]]).bfloat16()
    left, right = torch.zeros(1, 1), torch.zeros(1, 6)
    ours = low_rank_update(weight, left, right, 1.0, implementation="triton")
    assert torch.equal(ours.isnan(), weight.isnan())
    assert torch.equal(ours[:, 1:], reference(weight, left, right, 1.0)[:, 1:])


def test_strided_operands():
    weight, left, right = operands(*ODD)
    strided = (tensor.T.contiguous().T for tensor in (weight, left, right))
    turned = low_rank_update(*strided, 1.0, implementation="triton")
    assert torch.equal(turned, low_rank_update(weight, left, right, 1.0, implementation="triton"))
