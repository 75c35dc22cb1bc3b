import pytest
import torch

from regraft.core.fourbit import FP4, NF4
from regraft.kernels.four_bit import block_scales, decode, encode, pair_table
from regraft.kernels.nf4_merge import nf4_merge, nf4_merge_scales, reference

TABLES = {"nf4": NF4, "fp4": FP4}
ALIGNED, ODD = (64, 256, 16), (37, 192, 5)
RAGGED = [(7, 37, 3), (33, 100, 4), (1, 130, 1), (200, 96, 8), (1, 64, 2), (3, 2, 1)]
"""Rows that are no whole blocks; the last block may be short."""


def operands(rows, columns, rank, block_size=64, table=NF4, *, exact=False):
    """Codes and scales of a random weight with a block of zeros, and factors; `exact`: sums exact in any order."""
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight.view(-1)[: min(block_size, weight.numel())] = 0
    scales = block_scales(weight.view(-1), block_size)
    codes = encode(weight.view(-1), scales, block_size, table)
    if exact:
        left, right = (
            torch.randint(-8, 9, shape, generator=generator).float() / 16 for shape in ((rows, rank), (rank, columns))
        )
    else:
        left, right = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    return codes, scales, left, right


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("shape", [ALIGNED, ODD, *RAGGED, (700, 1024, 4)], ids=str)
def test_blocks_of_rows_have_the_bits_of_the_reference(shape, block_size, kind):
    """Several blocks of rows in the last shape; products are exact, which BLAS sums in several orders."""
    given = operands(*shape, block_size, TABLES[kind], exact=True)
    options = {"table": TABLES[kind], "block_size": block_size}
    codes, scales = nf4_merge(*given, 0.5, **options)
    expected_codes, expected_scales = reference(*given, 0.5, **options)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(nf4_merge_scales(*given, 0.5, **options), expected_scales)
    assert (codes != given[0]).any()


def test_bits_of_a_row_depend_neither_on_its_company_nor_on_threads():
    codes, scales, left, right = operands(300, 640, 16)
    whole = nf4_merge(codes, scales, left, right, 0.7, table=NF4)
    for step in (1, 2, 100):
        parts = [
            nf4_merge(
                codes[start * 320 : (start + step) * 320], scales[start * 10 : (start + step) * 10],
                left[start : start + step], right, 0.7, table=NF4,
            )
            for start in range(0, 300, step)
        ]  # fmt: skip
        assert all(
            torch.equal(torch.cat(found), every) for found, every in zip(zip(*parts, strict=True), whole, strict=True)
        )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(map(torch.equal, nf4_merge(codes, scales, left, right, 0.7, table=NF4), whole))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", TABLES)
def test_a_delta_of_zero_changes_no_scale_and_no_value(kind):
    """Quantising again what was quantised is exact, since every block holds its own largest magnitude."""
    table = TABLES[kind]
    codes, scales, left, right = operands(*ODD, table=table)
    found = nf4_merge(codes, scales, torch.zeros_like(left), right, 1.0, table=table)
    assert torch.equal(found[1], scales)
    values = [decode(each, scales, pair_table(table), 64, 2 * len(codes)) for each in (found[0], codes)]
    assert torch.equal(*values)
    if kind == "nf4":  # FP4 has two codes for zero, of which one comes back
        assert torch.equal(found[0], codes)


def test_operands_that_do_not_fit():
    codes, scales, left, right = operands(*ODD)
    for wrong in ((codes[1:], scales, left, right), (codes, scales[1:], left, right), (codes, scales, left[1:], right),
                  (codes, scales, left, right[1:])):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit blocks of 64"):
            nf4_merge(*wrong, 1.0, table=NF4)


def test_triton_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for shape, block_size, fault in (
        (ALIGNED, 64, "on cpu, not on a CUDA device"),
        (ALIGNED, 512, "no blocks of 512"),
        ((33, 100, 4), 64, "rows of 100 are no whole number of blocks of 64"),
    ):
        with pytest.raises(RuntimeError, match=fault):
            nf4_merge(*operands(*shape, block_size), 1.0, table=NF4, block_size=block_size, implementation="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", TABLES)
def test_triton_on_a_gpu(kind):
    for shape in (ALIGNED, ODD, (1000, 3072, 64)):
        given = operands(*shape, table=TABLES[kind], exact=True)
        ours = nf4_merge(*(tensor.cuda() for tensor in given), 0.5, table=TABLES[kind], implementation="triton")
        expected = reference(*given, 0.5, table=TABLES[kind])
        assert all(torch.equal(found.cpu(), wanted) for found, wanted in zip(ours, expected, strict=True))
