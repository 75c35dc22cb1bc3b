import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from regraft.kernels.lora_merge import BLOCK_ELEMENTS, Merge, lora_merge, lora_merge_group, reference
from regraft.kernels.stochastic import noise, round_stochastically

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNED, ODD = (64, 128, 16), (37, 101, 5)


def operands(rows, cols, rank, dtype=torch.float32, factor_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, cols), (rows, rank), (rank, cols))
    weight, left, right = (torch.randn(shape, generator=generator) for shape in shapes)
    return weight.to(dtype), left.to(factor_dtype), right.to(factor_dtype)


def nearest(values, dtype):
    """Round float64 values to `dtype`, to nearest, ties to even, by arithmetic on the significand alone."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}[dtype]
    fraction, exponent = torch.frexp(values)
    return torch.ldexp((fraction * 2.0**bits).round(), exponent - bits)


@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, (ALIGNED, ODD))))
def test_reference_is_one_rounding_of_the_exact_sum(dtype, shape):
    """Small integers make products and sums exact in fp32, so only the last rounding is left; ties included."""
    rows, cols, rank = shape
    generator = torch.Generator().manual_seed(1)
    left = torch.randint(-8, 9, (rows, rank), generator=generator).float()
    right = torch.randint(-8, 9, (rank, cols), generator=generator).float()
    weight = torch.randint(-2000, 2001, (rows, cols), generator=generator).double()
    weight = nearest(weight, dtype).to(dtype)
    exact = weight.double() + 0.5 * (left.double() @ right.double())
    assert torch.equal(reference(weight, left, right, 0.5).double(), nearest(exact, dtype))
    if dtype == torch.bfloat16:
        scaled = exact / torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - 9)
        assert (scaled.remainder(2) == 1).any(), "no ties among the values: the test shows nothing of them"


def exactly_fused(left, right):
    """The chain of fused multiply-adds in rational arithmetic: the oracle of the reference's rounding to odd."""
    total = [[Fraction(0)] * right.shape[1] for _ in range(len(left))]
    for i, j, k in itertools.product(range(len(left)), range(right.shape[1]), range(right.shape[0])):
        exact = Fraction(left[i, k].item()) * Fraction(right[k, j].item()) + total[i][j]
        total[i][j] = Fraction(nearest_fp32(exact))
    return torch.tensor([[float(value) for value in row] for row in total])


def nearest_fp32(value):
    """`value` as fp32, to nearest, ties to even, in integers."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value))) - 23
    while abs(value) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    while abs(value) < Fraction(2) ** (exponent + 23):
        exponent -= 1
    return float(round(value / Fraction(2) ** exponent) * Fraction(2) ** exponent)


def test_reference_adds_along_the_rank_by_fused_multiply_adds():
    weight, left, right = operands(4, 5, 9)
    left[0], right[:, 0] = 1.0, 2.0**-24  # sums that lie halfway between two fp32 numbers
    left[0, 0], right[0, 0] = 1.0, 1.0
    ours = reference(torch.zeros_like(weight), left, right, 1.0)
    assert torch.equal(ours, exactly_fused(left, right))


@pytest.mark.parametrize(("dtype", "factors"), list(itertools.product((*DTYPES, torch.float64), DTYPES)))
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
def test_torch_path_has_the_bits_of_the_reference(dtype, factors, scale):
    """Where BLAS adds in order with fused multiply-adds; measured on the machines of the project."""
    for shape in (ALIGNED, ODD, (1, 300, 4), (3, 1, 1)):
        weight, left, right = operands(*shape, dtype, factors)
        assert torch.equal(lora_merge(weight, left, right, scale), reference(weight, left, right, scale))
        seeded = reference(weight, left, right, scale, 7, 11)
        assert torch.equal(lora_merge(weight, left, right, scale, seed=7, first_row=11), seeded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 640, 16), (130, 513, 7), (200, 96, 128)])
def test_bits_of_a_row_depend_neither_on_its_company_nor_on_threads(dtype, shape):
    weight, left, right = operands(*shape, dtype)
    whole = lora_merge(weight, left, right, 0.7)
    noisy = lora_merge(weight, left, right, 0.7, seed=3)
    for step in (1, 2, 3, 64, 100):
        blocks = [slice(start, start + step) for start in range(0, len(weight), step)]
        parts = [lora_merge(weight[block], left[block], right, 0.7) for block in blocks]
        assert torch.equal(torch.cat(parts), whole), step
        options = [{"seed": 3, "first_row": block.start} for block in blocks]
        parts = [lora_merge(weight[b], left[b], right, 0.7, **each) for b, each in zip(blocks, options, strict=True)]
        assert torch.equal(torch.cat(parts), noisy), step
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(lora_merge(weight, left, right, 0.7), whole)
    finally:
        torch.set_num_threads(before)


def test_more_than_one_block():
    weight, left, right = operands(BLOCK_ELEMENTS // 512 + 3, 512, 4, torch.bfloat16)
    assert torch.equal(lora_merge(weight, left, right, 1.5), reference(weight, left, right, 1.5))


def test_weight_is_left_as_it_is():
    weight, left, right = operands(*ODD)
    before = weight.clone()
    result = lora_merge(weight, left, right, 1.0)
    assert torch.equal(weight, before)
    assert result.data_ptr() != weight.data_ptr()


def test_zero_factor_changes_nothing():
    weight, left, right = operands(*ODD, torch.bfloat16)
    assert torch.equal(lora_merge(weight, torch.zeros_like(left), right, 3.0), weight)


MISFITS = [((4, 5), (4, 2), (3, 5)), ((4, 5), (3, 2), (2, 5)), ((4, 5), (4, 2), (2, 6)), ((4,), (4, 1), (1, 4))]


@pytest.mark.parametrize("shapes", MISFITS)
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match="do not fit"):
        lora_merge(*(torch.zeros(shape) for shape in shapes), 1.0)


def test_triton_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu, not on a CUDA device"):
        lora_merge(*operands(*ODD), 1.0, implementation="triton")
    with pytest.raises(RuntimeError, match="float64"):
        lora_merge(*operands(*ODD, torch.float64), 1.0, implementation="triton")


def test_importing_the_torch_path_does_not_import_triton():
    import subprocess
    import sys

    code = "import sys, regraft.kernels.lora_merge; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_group_is_its_members():
    merges = [Merge(*operands(*shape, dtype, seed=1), 0.3, seed) for shape, dtype, seed in GROUP]
    apart = [lora_merge(one.weight, one.left, one.right, one.scale, seed=one.seed) for one in merges]
    assert all(torch.equal(ours, own) for ours, own in zip(lora_merge_group(merges), apart, strict=True))
    assert lora_merge_group([]) == []


GROUP = [
    (ALIGNED, torch.bfloat16, None), (ODD, torch.float32, None), ((3, 1, 1), torch.bfloat16, 5),
    (ODD, torch.float16, None), ((33, 272, 2), torch.bfloat16, None), (ODD, torch.float16, 2**64 - 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_goes_to_a_neighbour_as_often_as_it_is_near(dtype):
    """Normal and subnormal numbers of both signs: the mean of many roundings is the number."""
    step = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    parts = [(1 + 0.3 * step, step), (-2 - 2 * 0.75 * step, 2 * step), (1.5, step)]
    if dtype == torch.float16:
        parts += [(2.0**-24 * 5.25, 2.0**-24), (-(2.0**-24) * 1022.5, 2.0**-24)]
    for value, unit in parts:
        rounded = round_stochastically(torch.full((400, 500), value), dtype, seed=1).double()
        fraction = abs(value) / unit % 1
        assert ((rounded - value).abs() < unit).all()
        assert (
            abs((rounded.mean().item() - value) / unit)
            < 5 * (fraction * (1 - fraction) / rounded.numel()) ** 0.5 + 1e-6
        )
        assert len(rounded.unique()) == (2 if fraction else 1)


def test_stochastic_rounding_leaves_what_needs_none():
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -0.5, 2.0**-24]])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ours = round_stochastically(special, dtype, seed=9)
        assert torch.equal(ours[:, 1:], special.to(dtype)[:, 1:])
        assert ours[0, 0].isnan()
        assert torch.equal(ours.float().signbit()[:, 1:], special.signbit()[:, 1:])


def test_noise_is_uniform_and_unlike_between_rows_columns_and_seeds():
    def mix(bits):
        bits = (bits ^ bits >> 16) * 0x7FEB352D % 2**32
        bits = (bits ^ bits >> 15) * 0x846CA68B % 2**32
        return bits ^ bits >> 16

    seed = 0xFEDCBA9876543210
    expected = mix(mix(mix(70_000 ^ seed % 2**32) ^ seed >> 32) ^ mix(513))
    assert noise(seed, 70_000, 1, 514)[0, 513].item() % 2**32 == expected
    plain = (noise(0, 0, 512, 512).double() / 2**32 % 1).numpy()
    others = [noise(1, 0, 512, 512), noise(2**32, 0, 512, 512), noise(0, 512, 512, 512), noise(0, 0, 512, 512).T]
    assert abs(plain.mean() - 0.5) < 0.003
    for other in others:
        assert abs(np.corrcoef(plain.ravel(), (other.double() / 2**32 % 1).numpy().ravel())[0, 1]) < 0.01
    for shift in (1, 2, 64):
        assert abs(np.corrcoef(plain[shift:].ravel(), plain[:-shift].ravel())[0, 1]) < 0.01
        assert abs(np.corrcoef(plain[:, shift:].ravel(), plain[:, :-shift].ravel())[0, 1]) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bits_on_a_gpu_are_those_of_the_reference():
    group = [*GROUP, ((1000, 3000, 64), torch.bfloat16, None), ((1000, 3000, 64), torch.bfloat16, 8)]
    merges = [Merge(*operands(*shape, dtype), 0.3, seed) for shape, dtype, seed in group]
    on_device = [Merge(one.weight.cuda(), one.left.cuda(), one.right.cuda(), one.scale, one.seed) for one in merges]
    for ours, one in zip(lora_merge_group(on_device, implementation="triton"), merges, strict=True):
        assert torch.equal(ours.cpu(), reference(one.weight, one.left, one.right, one.scale, one.seed))
