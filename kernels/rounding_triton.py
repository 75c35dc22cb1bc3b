"""Rounding inside Triton kernels: to nearest, and stochastically as `regraft.kernels.stochastic` says."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def round_to_nearest(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The fp32 tensor `x` in `dtype`, to nearest, ties to even; NaN stays NaN.

    bf16 is rounded on the bit pattern, because the interpreter's own conversion truncates; fp16 is right everywhere.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _mix(bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """See `regraft.kernels.stochastic`; uint32."""
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def noise(seed_low, seed_high, row, column):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """32 random bits of every element; seeds uint32, `row` [R] and `column` [C] uint32; gives uint32 [R, C]."""
    row = _mix(_mix(row ^ seed_low) ^ seed_high)
    return _mix(row[:, None] ^ _mix(column)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def round_stochastically(x, random, dtype: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The fp32 tensor `x` in `dtype`, bf16 or fp16, by the noise `random` of its elements."""
    bits = x.to(tl.uint32, bitcast=True)
    infinite = (bits & 0x7FFFFFFF) >= 0x7F800000
    if dtype == tl.bfloat16:
        cut = (bits + (random >> 16)) >> 16
        cut = tl.where(infinite, (bits >> 16) | tl.where(x == x, 0, 0x40), cut)
        return cut.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    sign = bits & 0x80000000
    size = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    lift = tl.where(size < 6.103515625e-05, 6.103515625e-05, 0.0)
    lifted = (size + lift).to(tl.uint32, bitcast=True)
    cut = ((lifted + (random >> 19)) & 0xFFFFE000).to(tl.float32, bitcast=True) - lift
    rounded = (cut.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(infinite, x, rounded).to(dtype)
