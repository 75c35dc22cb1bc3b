"""requantise(dequantise(codes, scales) + s·(L @ R)): a low-rank update of a 4-bit weight that stays in 4 bits.

    W = table[codes] · scales                        fp32, block by block along a row
    V = W + round(s·(L @ R))                         products and sums in fp32
    scales' = max |block of V|,  codes' = the codes nearest to V / scales'

The float weight never exists as a whole: the CPU works in blocks of rows, the Triton kernel in tiles that stay in
registers. `reference` is the specification; `regraft.kernels.four_bit` has the arithmetic of codes and scales. The
Triton kernel stands in `nf4_merge_triton`, apart from this file because importing triton costs 70 MB.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from regraft.kernels.four_bit import block_scales, decode, encode, pair_table
from regraft.kernels.lora_merge import BLOCK_ELEMENTS, lora_merge

Implementation = Literal["auto", "torch", "triton"]

TRITON_BLOCK_SIZES = (32, 64, 128, 256)
"""Larger blocks do not fit a tile that a program can hold."""


def reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    *,
    table: Sequence[float],
    block_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `nf4_merge`: the whole float weight at once."""
    shape = (len(left), right.shape[1])
    weight = decode(codes, scales, pair_table(table, codes.device), block_size, math.prod(shape)).view(shape)
    total = (weight + (left.float() @ right.float()) * scale).view(-1)
    found = block_scales(total, block_size)
    return encode(total, found, block_size, table), found


def nf4_merge(
    codes: torch.Tensor,
    scales: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    *,
    table: Sequence[float],
    block_size: int = 64,
    implementation: Implementation = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a 4-bit weight plus s·(L @ R).

    Shapes: R rows, C columns, K rank; the weight is [R, C].

    Args:
        codes: uint8 [ceil(R·C / 2)], two codes a byte.
        scales: fp32 [ceil(R·C / block_size)]; doubly quantised ones are given dequantised.
        left: [R, K], any float dtype.
        right: [K, C], any float dtype.
        scale: s.
        table: the value of each of the 16 codes: NF4 or FP4.
        block_size: elements that share a scale, counted along the flattened weight.
        implementation: `auto` takes Triton for CUDA tensors whose rows are whole blocks, and torch elsewhere.

    Returns:
        New codes and scales, in the shapes of the old ones. The bits of a block do not depend on the rows beside it.

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: `triton` is asked for where it cannot run.
    """
    _check_shapes(codes, scales, left, right, block_size)
    if _chosen(implementation, codes, right.shape[1], block_size) == "triton":
        from regraft.kernels.nf4_merge_triton import launch

        return launch(codes, scales, left, right, scale, table, block_size)
    found_codes, found_scales = torch.empty_like(codes), torch.empty_like(scales)
    for at, blocks, total in _totals(codes, scales, left, right, scale, table, block_size):
        found_scales[blocks] = block_scales(total, block_size)
        found_codes[at] = encode(total, found_scales[blocks], block_size, table)
    return found_codes, found_scales


def nf4_merge_scales(
    codes: torch.Tensor,
    scales: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    *,
    table: Sequence[float],
    block_size: int = 64,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """The scales that `nf4_merge` gives, at a third of its price; arguments as there."""
    _check_shapes(codes, scales, left, right, block_size)
    if _chosen(implementation, codes, right.shape[1], block_size) == "triton":
        from regraft.kernels.nf4_merge_triton import launch

        return launch(codes, scales, left, right, scale, table, block_size, only_scales=True)[1]
    found = torch.empty_like(scales)
    for _, blocks, total in _totals(codes, scales, left, right, scale, table, block_size):
        found[blocks] = block_scales(total, block_size)
    return found


def _check_shapes(
    codes: torch.Tensor, scales: torch.Tensor, left: torch.Tensor, right: torch.Tensor, block_size: int
) -> None:
    shapes = [tuple(tensor.shape) for tensor in (codes, scales, left, right)]
    fits = left.dim() == right.dim() == 2 and left.shape[1] == right.shape[0]
    if fits:
        count = len(left) * right.shape[1]
        fits = shapes[:2] == [(-(-count // 2),), (-(-count // block_size),)]
    if not fits:
        raise ValueError(f"shapes of codes, scales, left and right do not fit blocks of {block_size}: {shapes}")


def _chosen(implementation: Implementation, codes: torch.Tensor, columns: int, block_size: int) -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    fault = (
        f"its kernel has no blocks of {block_size}"
        if block_size not in TRITON_BLOCK_SIZES
        else f"rows of {columns} are no whole number of blocks of {block_size}"
        if columns % block_size
        else ""
        if codes.is_cuda or interpreted
        else f"the tensors are on {codes.device}, not on a CUDA device"
    )
    if implementation == "triton" and fault:
        raise RuntimeError(f"the Triton implementation of nf4_merge cannot run: {fault}")
    if implementation == "auto":
        return "torch" if fault or not codes.is_cuda else "triton"
    return implementation


def _totals(
    codes: torch.Tensor,
    scales: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    table: Sequence[float],
    block_size: int,
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """The places of codes and scales, and the fp32 sums, flattened, of some rows after others that are whole blocks."""
    pairs, right = pair_table(table, codes.device), right.float()
    rows, columns = len(left), right.shape[1]
    unit = max(2, math.lcm(columns, 2 * block_size) // max(1, columns))
    step = max(unit, BLOCK_ELEMENTS // max(1, columns) // unit * unit)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        begin, end = start * columns, stop * columns
        at, blocks = slice(begin // 2, -(-end // 2)), slice(begin // block_size, -(-end // block_size))
        weight = decode(codes[at], scales[blocks], pairs, block_size, end - begin).view(-1, columns)
        yield at, blocks, lora_merge(weight, left[start:stop].float(), right, scale).view(-1)
