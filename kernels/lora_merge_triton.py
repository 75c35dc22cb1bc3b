"""The Triton kernel of `lora_merge`: a group of matrices in one launch; and what is compiled ahead of time to check it.

A table holds addresses, extents and scale of every matrix, a second one says for every program which tile of which
matrix is its own. A weight is read once and written once; the product never leaves the registers. It is summed along
the rank by fused multiply-adds in ascending order, not by `tl.dot`, whose order is the compiler's: so the bits are
those of `regraft.kernels.lora_merge.reference`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from regraft.kernels.lora_merge import Merge
from regraft.kernels.rounding_triton import noise, round_stochastically, round_to_nearest

ROWS, COLS = 16, 256
"""Tile of the output: a thread sums 16 x 2 elements and loads 18 factors a step; at 64 x 64 it would load 33."""

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
"""Without fusion s·P is rounded before W is added, as in the reference, whatever a triton version has as its default;
the chain along the rank asks for its fused multiply-adds by name."""

FIELDS = tl.constexpr(10)
"""Of a matrix in the table, int64 each: addresses of W, L, R and out; rows, columns, rank; bits of the scale (fp32);
seed; first row."""

_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_TILE_BITS = 24
_LARGEST_GROUP = 1 << 15


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    table_ptr, tiles_ptr,  # noqa: ANN001
    DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile [BR, BC] of round(W + s·(L @ R)); W and out [rows, cols], L [rows, rank], R [rank, cols], row-major."""
    tile = tl.load(tiles_ptr + tl.program_id(0))
    p_m = table_ptr + (tile >> 48) * FIELDS
    first_row, first_col = ((tile >> 24) & 0xFFFFFF) * BR, (tile & 0xFFFFFF) * BC
    w_ptr = tl.load(p_m).to(tl.pointer_type(DTYPE))
    l_ptr = tl.load(p_m + 1).to(tl.pointer_type(tl.float32))
    r_ptr = tl.load(p_m + 2).to(tl.pointer_type(tl.float32))
    out_ptr = tl.load(p_m + 3).to(tl.pointer_type(DTYPE))
    rows, cols, rank = tl.load(p_m + 4), tl.load(p_m + 5), tl.load(p_m + 6)
    scale = tl.load(p_m + 7).to(tl.int32).to(tl.float32, bitcast=True)
    if ALIGNED:
        w_ptr = tl.multiple_of(w_ptr, 16)
        out_ptr, cols = tl.multiple_of(out_ptr, 16), tl.multiple_of(cols, 16)
    i_r, i_c = tl.arange(0, BR), tl.arange(0, BC)
    m_r, m_c = i_r < rows - first_row, i_c < cols - first_col
    l_ptr += first_row * rank
    r_ptr += first_col
    p_l = i_r * rank.to(tl.int32)
    b_p = tl.zeros((BR, BC), dtype=tl.float32)
    for i_k in range(rank):
        b_l = tl.load(l_ptr + i_k + p_l, mask=m_r, other=0.0)
        b_r = tl.load(r_ptr + i_k * cols + i_c, mask=m_c, other=0.0)
        b_p = tl.fma(tl.broadcast_to(b_l[:, None], (BR, BC)), tl.broadcast_to(b_r[None, :], (BR, BC)), b_p)
    origin = first_row * cols + first_col
    w_ptr += origin
    out_ptr += origin
    p_w = i_r[:, None] * cols.to(tl.int32) + i_c[None, :]
    mask = m_r[:, None] & m_c[None, :]
    b_out = tl.load(w_ptr + p_w, mask=mask, other=0.0).to(tl.float32) + b_p * scale
    if STOCHASTIC:
        seed, row = tl.load(p_m + 8), tl.load(p_m + 9) + first_row + i_r
        column = (first_col + i_c).to(tl.uint32)
        random = noise(seed.to(tl.uint32), (seed >> 32).to(tl.uint32), row.to(tl.uint32), column)
        tl.store(out_ptr + p_w, round_stochastically(b_out, random, DTYPE), mask=mask)
    else:
        tl.store(out_ptr + p_w, round_to_nearest(b_out, DTYPE), mask=mask)


def launch(merges: Sequence[Merge]) -> list[torch.Tensor]:
    """Run the kernel, once for each dtype and kind of rounding; relies on the checks of `lora_merge_group`."""
    results: dict[int, torch.Tensor] = {}
    groups: dict[tuple[torch.dtype, bool, torch.device], list[int]] = {}
    for number, merge in enumerate(merges):
        stochastic = merge.seed is not None and merge.weight.dtype != torch.float32
        groups.setdefault((merge.weight.dtype, stochastic, merge.weight.device), []).append(number)
    for (dtype, stochastic, device), members in groups.items():
        for start in range(0, len(members), _LARGEST_GROUP):
            numbers = members[start : start + _LARGEST_GROUP]
            outs = _launch_group([merges[number] for number in numbers], dtype, stochastic, device)
            results.update(zip(numbers, outs, strict=True))
    return [results[number] for number in range(len(merges))]


def _launch_group(
    merges: Sequence[Merge], dtype: torch.dtype, stochastic: bool, device: torch.device
) -> list[torch.Tensor]:
    weights = [merge.weight.contiguous() for merge in merges]
    lefts = [merge.left.to(device, torch.float32).contiguous() for merge in merges]
    rights = [merge.right.to(device, torch.float32).contiguous() for merge in merges]
    outs = [torch.empty_like(weight) for weight in weights]
    rows = []
    aligned = True
    for merge, *tensors in zip(merges, weights, lefts, rights, outs, strict=True):
        addresses = [tensor.data_ptr() for tensor in tensors]
        extents = [*merge.weight.shape, merge.left.shape[1]]
        scale = struct.unpack("<i", struct.pack("<f", merge.scale))[0]
        seed = merge.seed or 0
        rows.append([*addresses, *extents, scale, seed - (seed >> 63 << 64), merge.first_row])
        aligned &= all(address % 16 == 0 for address in addresses) and extents[1] % 16 == 0
    tiles = _tiles([tuple(weight.shape) for weight in weights])
    if len(tiles):
        kernel[(len(tiles),)](
            torch.tensor(rows, dtype=torch.int64).to(device), tiles.to(device), DTYPE=_DTYPES[dtype],
            STOCHASTIC=stochastic, ALIGNED=aligned, BR=ROWS, BC=COLS, **OPTIONS,
        )  # fmt: skip
    return outs


def _tiles(shapes: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """For every program its matrix, tile of rows and tile of columns, packed into an int64: 15, 24 and 24 bits."""
    parts = []
    for number, (rows, cols) in enumerate(shapes):
        down, across = torch.arange(triton.cdiv(rows, ROWS)), torch.arange(triton.cdiv(cols, COLS))
        parts.append(((number << 48) + (down[:, None] << _TILE_BITS) + across).flatten())
    return torch.cat(parts)


def builds() -> dict[str, dict[str, Any]]:
    """Every form of the kernel that is shipped, by name, as arguments of an ahead-of-time build."""
    names = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    found = {}
    for name, dtype in names.items():
        for stochastic in (False, True) if name != "fp32" else (False,):
            constants = {"DTYPE": dtype, "STOCHASTIC": stochastic, "ALIGNED": True, "BR": ROWS, "BC": COLS}
            found[f"lora_merge[{name}{', stochastic' if stochastic else ''}]"] = {
                "function": kernel,
                "signature": {"table_ptr": "*i64", "tiles_ptr": "*i64", **dict.fromkeys(constants, "constexpr")},
                "constants": constants,
                "attributes": {(index,): [["tt.divisibility", 16]] for index in (0, 1)},
                "options": OPTIONS,
            }
    return found
