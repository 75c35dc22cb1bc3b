"""Stochastic rounding of fp32 to bf16 and fp16 with noise that is a function of seed, row and column alone.

    n(i, j) = mix(mix(mix(i ^ seed_low) ^ seed_high) ^ mix(j))      32 bits; mix is a bijection of 32-bit integers
    out = toward zero of |x| + u·ulp(x), sign kept                  u from the upper bits of n, as many as the cut drops

A value between two neighbours goes to the upper one as often as it is near to it, in steps of 2^-16 (bf16) or 2^-13
(fp16), so the mean of a rounded delta is the delta. There is no state: a row has the same bits whatever rows are
rounded with it, and on every device. mix has the shifts and factors of Wellons' "lowbias32" (hash-prospector, public
domain).
"""

from __future__ import annotations

import torch

SMALLEST_NORMAL = 2.0**-14
"""Of fp16. Below it numbers lie as far apart as just above it, so they are rounded after it is added."""

_MASK32 = 0xFFFFFFFF


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, seed: int, first_row: int = 0) -> torch.Tensor:
    """`values` in `dtype`; what needs no rounding, infinities and NaN stay as they are.

    Args:
        values: [R, C], fp32; any dtype where `dtype` is as wide, which is then converted.
        dtype: bf16 or fp16 are rounded stochastically, fp32 and fp64 to nearest.
        seed: 0 to 2^64 - 1.
        first_row: number of the first row in the whole matrix.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return values.to(dtype)
    random = noise(seed, first_row, *values.shape, device=values.device)
    if dtype == torch.bfloat16:
        rounded = _cut(values, random, 16)
    else:
        small = values.abs() < SMALLEST_NORMAL
        lift = torch.where(small, torch.copysign(torch.full_like(values, SMALLEST_NORMAL), values), 0.0)
        rounded = _cut(values + lift, random, 13) - lift
        rounded = torch.copysign(rounded, values)
    return torch.where(values.isfinite(), rounded, values).to(dtype)


def _cut(values: torch.Tensor, random: torch.Tensor, dropped: int) -> torch.Tensor:
    """Add the upper bits of the noise to the lowest `dropped` bits, and clear them."""
    added = (random >> 32 - dropped).bitwise_and_((1 << dropped) - 1)
    bits = added.add_(values.contiguous().view(torch.int32))
    return bits.bitwise_and_(-1 << dropped).view(torch.float32)


def noise(seed: int, first_row: int, rows: int, cols: int, *, device: torch.device | None = None) -> torch.Tensor:
    """The 32 random bits of every element, int32 [rows, cols]."""
    row = torch.arange(first_row, first_row + rows, device=device).to(torch.int32)
    row = _mix(_mix(row ^ _signed(seed & _MASK32)) ^ _signed(seed >> 32 & _MASK32))
    column = _mix(torch.arange(cols, device=device).to(torch.int32))
    return _mix(row[:, None] ^ column)


def _signed(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers that makes neighbours strangers; products wrap around."""
    bits = (bits >> 16).bitwise_and_(0xFFFF).bitwise_xor_(bits).mul_(0x7FEB352D)
    bits = (bits >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(bits).mul_(_signed(0x846CA68B))
    return (bits >> 16).bitwise_and_(0xFFFF).bitwise_xor_(bits)
