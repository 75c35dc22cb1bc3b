"""The Triton kernels in the interpreter, which must be on before they are imported: they run by themselves."""

import itertools
import os

import pytest
import torch

from regraft.kernels.calibrated_attention import calibrated_attention, reference
from tests.kernels.test_calibrated_attention import CALIBRATIONS, PADDINGS, operands, padding_of, real

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="`nox -s kernels` sets TRITON_INTERPRET=1"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log:RuntimeWarning"),  # of a row that sees nothing
]

TOLERANCE = {torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}
"""Outputs are of order 1; weights are rounded to the operands' dtype before they meet the values."""


@pytest.mark.parametrize(("calibration", "kind"), list(itertools.product(CALIBRATIONS, PADDINGS)))
def test_forward(calibration, kind):
    """Odd lengths and widths, grouped heads, more than a tile, softcapped or not; the memory is that of torch."""
    shapes = ((75, 3, 1, 24), (64, 2, 2, 16)) if kind is None else ((75, 3, 1, 24),)
    for dtype, (length, heads, groups, width) in itertools.product(TOLERANCE, shapes):
        some = operands(length, heads=heads, groups=groups, width=width, dtype=dtype)
        padding = padding_of(kind, 2, length)
        for cap in (None, 4.0) if dtype == torch.float32 else (None,):
            ours, memory = calibrated_attention(
                *some, calibration, padding=padding, softcap=cap, implementation="triton"
            )
            expected, _, sinks = reference(*(one.double() for one in some), calibration, padding=padding, softcap=cap)
            plain, other = calibrated_attention(*some, calibration, padding=padding, softcap=cap)
            assert sinks.any()
            assert ours.dtype == dtype
            error, apart = (real(one.double() - expected, padding).abs() for one in (ours, plain))
            # in fp16 a mean may stand on the other side of the threshold than in fp64, for torch as for the kernel
            assert (error > TOLERANCE[dtype] + apart).sum() == 0
            for name in ("sums", "counts", "mass", "real"):
                assert (getattr(memory, name) - getattr(other, name)).abs().max() < 1e-3


def test_single_row_and_the_same_bits_twice():
    some = operands(1, dtype=torch.float32)
    for calibration in CALIBRATIONS:
        assert torch.equal(calibrated_attention(*some, calibration, implementation="triton")[0],
                           some[2].repeat_interleave(2, 1))  # fmt: skip
    some = operands(70, dtype=torch.float32)
    first, second = (calibrated_attention(*some, CALIBRATIONS[0], implementation="triton")[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_the_kernels_do_not_take_is_refused():
    query, key, value = operands(20)
    for some in ((query, key, value), [one.float().requires_grad_() for one in (query, key, value)]):
        with pytest.raises(RuntimeError, match="cannot run"):
            calibrated_attention(*some, CALIBRATIONS[0], implementation="triton")
