"""The Triton kernel in the interpreter, which must be on before the kernel is imported: they run by themselves."""

import os

import pytest
import torch

from regraft.core.fourbit import NF4
from regraft.kernels.nf4_merge import nf4_merge, nf4_merge_scales, reference
from tests.kernels.test_nf4_merge import ALIGNED, ODD, TABLES, operands

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="`nox -s kernels` sets TRITON_INTERPRET=1")


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("block_size", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [ALIGNED, ODD, (1, 64, 1), (66, 320, 33)], ids=str)
def test_has_the_bits_of_the_reference(shape, block_size, kind):
    """Sums that are exact in any order; rows, columns and ranks that are no whole tiles."""
    if shape[1] % block_size:
        pytest.skip("refused: rows of no whole number of blocks")
    given = operands(*shape, block_size, TABLES[kind], exact=True)
    options = {"table": TABLES[kind], "block_size": block_size}
    codes, scales = nf4_merge(*given, 0.5, implementation="triton", **options)
    expected_codes, expected_scales = reference(*given, 0.5, **options)
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(nf4_merge_scales(*given, 0.5, implementation="triton", **options), expected_scales)


def test_sums_in_another_order_change_almost_no_code():
    given = operands(64, 256, 48)
    codes, scales = nf4_merge(*given, 0.3, table=NF4, implementation="triton")
    expected_codes, expected_scales = reference(*given, 0.3, table=NF4)
    assert torch.allclose(scales, expected_scales, rtol=1e-6)
    assert (codes != expected_codes).float().mean() < 1e-3


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_what_is_not_finite_reaches_the_scales():
    codes, scales, left, right = operands(*ODD)
    left[3, 0] = float("nan")
    found = nf4_merge(codes, scales, left, right, 1.0, table=NF4, implementation="triton")[1].view(ODD[0], -1)
    assert found[3].isnan().all()
    assert found[:3].isfinite().all()
    assert found[4:].isfinite().all()


def test_strided_operands_and_factors_of_another_dtype():
    codes, scales, left, right = operands(*ODD, exact=True)
    turned = (left.bfloat16().T.contiguous().T, right.half().T.contiguous().T)
    found = nf4_merge(codes, scales, *turned, 1.0, table=NF4, implementation="triton")
    assert all(map(torch.equal, found, reference(codes, scales, left, right, 1.0, table=NF4)))
