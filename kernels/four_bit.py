"""Four-bit weights in bitsandbytes' arithmetic: two codes a byte, one scale for each block of the flattened weight.

    scale = max |block|        scaled = clamp(value · (1 / scale), -1, 1)        code: the nearest of the 16 values

`value = table[code] · scale`; the first of two codes is in the high half of its byte. A table is given as the value of
each code, so that the same functions serve NF4 and FP4. Everything equals bitsandbytes' `quantize_4bit` and
`dequantize_4bit`, bit for bit, without importing it: that takes seconds, its CPU quantiser needs 2.2 times as long (25
against 11 ns an element), and on CPUs with AVX512 its dequantiser takes wrong scales where a row is no whole number of
blocks (0.50.2: error 0.26 of the norm instead of 0.09).

With double quantisation the scales, less their mean, are stored in 8 bits in blocks of their own, as
`quantize_blockwise` does on every device but the CPU: bitsandbytes' CPU library finds the nearest of the 256 values
through a table of 65536 steps, and is one code off where a scale lies within 1.5e-5 of a midpoint (0.1% of them).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_SMALLEST_SCALE = 1e-38
"""Blocks of zeros are divided by this instead of by zero."""


def pair_table(table: Sequence[float], device: str | torch.device = "cpu") -> torch.Tensor:
    """For each byte the values of its two codes, [256] pairs of fp32, each pair seen as one int64.

    Looking up pairs takes 0.9 ns an element, single codes 20 ns.
    """
    values = torch.tensor(table, dtype=torch.float32)
    high, low = values.repeat_interleave(16), values.repeat(16)
    return torch.stack([high, low], dim=1).view(torch.int64).view(-1).to(device)


def ranking(table: Sequence[float]) -> tuple[list[int], list[float]]:
    """The codes in the order of their values, and the 15 midpoints between neighbours, in fp32 arithmetic.

    FP4 has two zeros; its code 0 comes first, so that code 8 is for small positive values, as in bitsandbytes.
    """
    order = sorted(range(len(table)), key=lambda code: table[code])
    values = torch.tensor(table, dtype=torch.float32)[order]
    return order, ((values[:-1] + values[1:]) / 2).tolist()


def decode(codes: torch.Tensor, scales: torch.Tensor, pairs: torch.Tensor, block_size: int, count: int) -> torch.Tensor:
    """Values of whole blocks; the last block may be shorter.

    Args:
        codes: uint8 [(count + 1) // 2], two codes a byte, beginning at a block.
        scales: fp32 [ceil(count / block_size)].
        pairs: `pair_table`.
        block_size: elements that share a scale.
        count: how many values are wanted.

    Returns:
        fp32 [count].
    """
    values = pairs.index_select(0, codes.int()).view(torch.float32)[:count]
    full = count // block_size
    values[: full * block_size].view(full, block_size).mul_(scales[:full, None])
    if full < len(scales):
        values[full * block_size :].mul_(scales[full])
    return values


def encode(values: torch.Tensor, scales: torch.Tensor, block_size: int, table: Sequence[float]) -> torch.Tensor:
    """Codes of whole blocks; the last block may be shorter.

    The rank of a value is the number of midpoints below it, counted one midpoint at a time: passes over a cached piece,
    11 ns an element, where `torch.bucketize` needs 21.

    Args:
        values: [count], float16, bfloat16 or float32.
        scales: `block_scales` of them.
        block_size: elements that share a scale.
        table: the value of each code.

    Returns:
        uint8 [(count + 1) // 2], two codes a byte; a missing last code is that of zero.
    """
    order, midpoints = ranking(table)
    scaled = _scaled(values.float(), scales, block_size)
    if len(scaled) % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = torch.zeros(len(scaled), dtype=torch.uint8, device=values.device)
    above = torch.empty(len(scaled), dtype=torch.bool, device=values.device)
    for midpoint in midpoints:
        torch.gt(scaled, midpoint, out=above)
        codes.add_(above.view(torch.uint8))
    if order != sorted(order):
        codes = torch.tensor(order, dtype=torch.uint8, device=values.device).index_select(0, codes.int())
    high, low = codes.view(-1, 2).unbind(1)
    return (high << 4).bitwise_or_(low)


def _scaled(values: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """Values between -1 and 1: full blocks times a reciprocal, a short last one by division, as bitsandbytes does."""
    full = len(values) // block_size
    blocks = values[: full * block_size].view(full, block_size)
    scaled = (blocks * scales[:full, None].clamp(min=_SMALLEST_SCALE).reciprocal()).view(-1)
    if full < len(scales):
        scaled = torch.cat([scaled, values[full * block_size :] / scales[full]])
    return scaled.clamp_(-1, 1)


def block_scales(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """The largest magnitude of each block, fp32 [ceil(count / block_size)]; the last block may be shorter.

    Args:
        values: [count], float16, bfloat16 or float32.
        block_size: elements that share a scale.
    """
    full = len(values) // block_size
    scales = values[: full * block_size].view(full, block_size).abs().amax(dim=1).float()
    if full * block_size == len(values):
        return scales
    last = values[full * block_size :].abs().max().float().clamp(min=_SMALLEST_SCALE)
    return torch.cat([scales, last[None]])


def encode_scales(
    scales: torch.Tensor, table: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise the scales of a weight in their turn.

    Args:
        scales: fp32 [count], all of them: their mean is taken.
        table: fp32 [256], rising: the value of each 8-bit code.
        block_size: scales that share a scale of their own.

    Returns:
        uint8 codes [count], fp32 scales of the scales [ceil(count / block_size)], and the mean, fp32 [].
    """
    offset = scales.mean()
    centred = scales - offset
    nested = block_scales(centred, block_size)
    ranks = torch.bucketize(_scaled(centred, nested, block_size), (table[:-1] + table[1:]) / 2, out_int32=True)
    return ranks.to(torch.uint8), nested, offset


def decode_scales(
    codes: torch.Tensor,
    nested: torch.Tensor,
    table: torch.Tensor,
    block_size: int,
    offset: torch.Tensor,
    start: int = 0,
) -> torch.Tensor:
    """The scales that `codes` stand for; `codes` begin at scale `start` of the weight, `nested` at its first."""
    blocks = torch.arange(start, start + len(codes), device=codes.device) // block_size
    return table[codes.long()] * nested[blocks] + offset
