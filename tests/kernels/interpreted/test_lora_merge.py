"""The Triton kernel in the interpreter, which must be on before the kernel is imported: they run by themselves."""

import itertools
import os

import pytest
import torch

from regraft.kernels.lora_merge import Merge, lora_merge, lora_merge_group, reference
from tests.kernels.test_lora_merge import ALIGNED, DTYPES, GROUP, ODD, operands

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="`nox -s kernels` sets TRITON_INTERPRET=1")

if INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def fma_kernel(x_ptr, out_ptr):
        x = tl.load(x_ptr)
        tl.store(out_ptr, tl.fma(x, x, -1.0 - 2.0**-11))


def rounds_once():
    """Whether a fused multiply-add of the interpreter is one; that of Triton before 3.9 rounds the product, too."""
    out = torch.zeros(1)
    fma_kernel[(1,)](torch.tensor([1 + 2.0**-12]), out)
    return float(out) == 2.0**-24


needs_fma = pytest.mark.skipif(INTERPRETED and not rounds_once(), reason="this interpreter rounds a product and a sum")


@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, (ALIGNED, ODD))))
def test_rounds_like_the_reference(dtype, shape):
    """Integers whose sums are exact in any order, half of them halfway between two bf16 numbers: the same bits."""
    rows, cols, rank = shape
    generator = torch.Generator().manual_seed(2)
    left = torch.randint(-8, 9, (rows, rank), generator=generator).float()
    right = torch.randint(-8, 9, (rank, cols), generator=generator).float()
    weight = torch.randint(-1000, 1001, (rows, cols), generator=generator).to(dtype)
    ours = lora_merge(weight, left, right, 0.5, implementation="triton")
    assert ours.dtype == dtype
    assert torch.equal(ours, reference(weight, left, right, 0.5))


@needs_fma
@pytest.mark.parametrize(("dtype", "factors"), list(itertools.product(DTYPES, DTYPES)))
def test_bits_are_those_of_the_reference(dtype, factors):
    for shape in (ALIGNED, ODD, (70, 300, 33), (1, 3, 1)):
        weight, left, right = operands(*shape, dtype, factors)
        for seed in (None, 2**63 + 12345):
            ours = lora_merge(weight, left, right, 0.3, seed=seed, first_row=70_000, implementation="triton")
            assert torch.equal(ours, reference(weight, left, right, 0.3, seed, 70_000)), (shape, seed)


@needs_fma
def test_a_group_in_one_launch():
    merges = [Merge(*operands(*shape, dtype), 0.3, seed) for shape, dtype, seed in GROUP]
    for ours, one in zip(lora_merge_group(merges, implementation="triton"), merges, strict=True):
        assert torch.equal(ours, reference(one.weight, one.left, one.right, one.scale, one.seed))


def test_subnormal_halves_are_rounded_stochastically_alike():
    weight = torch.zeros(20, 30).half()
    left, right = operands(20, 30, 2)[1:]
    ours = lora_merge(weight, left, right, 3e-6, seed=1, implementation="triton")
    assert (ours.abs() < 2.0**-14).any()
    assert torch.equal(ours, reference(weight, left, right, 3e-6, 1))


def test_scale_is_rounded_before_the_sum():
    """s·P and the sum are rounded one after the other; a fused multiply-add would give other bits."""
    weight, left, right = torch.full((4, 4), -0.1), torch.full((4, 1), 1.1), torch.full((1, 4), 1.0)
    expected = reference(weight, left, right, 0.1)
    fused = (weight.double() + float(torch.tensor(0.1)) * left.double() @ right.double()).float()
    assert not torch.equal(expected, fused)
    assert torch.equal(lora_merge(weight, left, right, 0.1, implementation="triton"), expected)


def test_special_values():
    """Without subnormal numbers: the interpreter's conversion of bf16 to fp32 drops them."""
    weight = torch.tensor([[float("nan"), float("inf"), -float("inf"), 3.4e38, -0.0, 1e-30]]).bfloat16()
    left, right = torch.zeros(1, 1), torch.zeros(1, 6)
    ours = lora_merge(weight, left, right, 1.0, implementation="triton")
    assert torch.equal(ours.isnan(), weight.isnan())
    assert torch.equal(ours[:, 1:], reference(weight, left, right, 1.0)[:, 1:])


def test_strided_operands():
    weight, left, right = operands(*ODD)
    strided = (tensor.T.contiguous().T for tensor in (weight, left, right))
    turned = lora_merge(*strided, 1.0, implementation="triton")
    assert torch.equal(turned, lora_merge(weight, left, right, 1.0, implementation="triton"))
