import itertools

import pytest
import torch

from regraft.kernels.low_rank_update import BLOCK_ELEMENTS, low_rank_update, reference

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


@pytest.mark.parametrize(("dtype", "factors"), list(itertools.product((*DTYPES, torch.float64), DTYPES)))
@pytest.mark.parametrize("scale", [1.0, 2.0, 0.3])
def test_torch_path_has_the_bits_of_the_reference(dtype, factors, scale):
    for shape in (ALIGNED, ODD, (1, 300, 4), (3, 1, 1)):
        weight, left, right = operands(*shape, dtype, factors)
        expected = reference(weight, left, right, scale)
        if len(weight) == 1:  # a single row is padded, which BLAS does not do for the reference
            expected = reference(weight.expand(2, -1), left.expand(2, -1), right, scale)[:1]
        assert torch.equal(low_rank_update(weight, left, right, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 640, 16), (130, 513, 7), (200, 96, 128)])
def test_bits_of_a_row_depend_neither_on_its_company_nor_on_threads(dtype, shape):
    weight, left, right = operands(*shape, dtype)
    whole = low_rank_update(weight, left, right, 0.7)
    for step in (1, 2, 3, 64, 100):
        blocks = [slice(start, start + step) for start in range(0, len(weight), step)]
        parts = [low_rank_update(weight[block], left[block], right, 0.7) for block in blocks]
        assert torch.equal(torch.cat(parts), whole), step
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(low_rank_update(weight, left, right, 0.7), whole)
    finally:
        torch.set_num_threads(before)


def test_more_than_one_block():
    weight, left, right = operands(BLOCK_ELEMENTS // 512 + 3, 512, 4, torch.bfloat16)
    assert torch.equal(low_rank_update(weight, left, right, 1.5), reference(weight, left, right, 1.5))


def test_weight_is_left_as_it_is():
    weight, left, right = operands(*ODD)
    before = weight.clone()
    result = low_rank_update(weight, left, right, 1.0)
    assert torch.equal(weight, before)
    assert result.data_ptr() != weight.data_ptr()


def test_zero_factor_changes_nothing():
    weight, left, right = operands(*ODD, torch.bfloat16)
    assert torch.equal(low_rank_update(weight, torch.zeros_like(left), right, 3.0), weight)


MISFITS = [((4, 5), (4, 2), (3, 5)), ((4, 5), (3, 2), (2, 5)), ((4, 5), (4, 2), (2, 6)), ((4,), (4, 1), (1, 4))]


@pytest.mark.parametrize("shapes", MISFITS)
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match="do not fit"):
        low_rank_update(*(torch.zeros(shape) for shape in shapes), 1.0)


def test_triton_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu, not on a CUDA device"):
        low_rank_update(*operands(*ODD), 1.0, implementation="triton")
    with pytest.raises(RuntimeError, match="float64"):
        low_rank_update(*operands(*ODD, torch.float64), 1.0, implementation="triton")


def test_importing_the_torch_path_does_not_import_triton():
    import subprocess
    import sys

    code = "import sys, regraft.kernels.low_rank_update; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_on_a_gpu(dtype):
    for shape in (ALIGNED, ODD, (1000, 3000, 64)):
        weight, left, right = (tensor.cuda() for tensor in operands(*shape, dtype))
        ours = low_rank_update(weight, left, right, 0.3, implementation="triton")
        exact = weight.double() + 0.3 * (left.double() @ right.double())
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 3e-7}[dtype]
