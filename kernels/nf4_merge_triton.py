"""The Triton kernel of `nf4_merge`, and what is compiled ahead of time to check its use of registers.

One program computes one tile of whole blocks: half a byte an element is read and half a byte written, and the float
weight never leaves the registers. Formula and rounding are those of `regraft.kernels.nf4_merge.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from regraft.kernels.four_bit import ranking

TILE, RANK = 4096, 16
"""Elements of a tile, which is at least 16 rows high for `tl.dot`, and the step along the rank."""

OPTIONS = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": False}
"""Without fusion s·P is rounded before W is added, as in the reference, whatever a triton version has as its default;
the dot itself is fused either way. With eight warps a thread has 16 elements of each tensor of a tile."""


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    c_ptr, s_ptr, l_ptr, r_ptr, t_ptr, m_ptr, o_ptr, c_out_ptr, s_out_ptr,  # noqa: ANN001
    rows, cols, rank, scale,  # noqa: ANN001
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
    SORTED: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Codes and scales of one tile [BR, BC]; codes [rows, cols / 2], scales [rows, cols / BS], all row-major.

    The table t has the value of each code, m the midpoints between values, o the codes in the order of their values,
    which is not looked at if SORTED. Without CODES only scales are written.
    """
    i_r = tl.program_id(1) * BR + tl.arange(0, BR)
    m_r = i_r < rows
    i_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = i_c < cols
    b_p = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, rank, BK):
        i_k = start + tl.arange(0, BK)
        m_k = i_k < rank
        p_l = l_ptr + i_r.to(tl.int64)[:, None] * rank + i_k[None, :]
        p_r = r_ptr + i_k.to(tl.int64)[:, None] * cols + i_c[None, :]
        b_l = tl.load(p_l, mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_r = tl.load(p_r, mask=m_k[:, None] & m_c[None, :], other=0.0)
        b_p = tl.dot(b_l.to(tl.float32), b_r.to(tl.float32), b_p, input_precision="ieee")

    i_h = tl.program_id(0) * (BC // 2) + tl.arange(0, BC // 2)
    p_c = i_r.to(tl.int64)[:, None] * (cols // 2) + i_h[None, :]
    m_h = m_r[:, None] & (i_h < cols // 2)[None, :]
    b_c = tl.load(c_ptr + p_c, mask=m_h, other=0).to(tl.int32)
    b_w = tl.join(tl.load(t_ptr + (b_c >> 4)), tl.load(t_ptr + (b_c & 15)))
    i_b = tl.program_id(0) * (BC // BS) + tl.arange(0, BC // BS)
    p_s = i_r.to(tl.int64)[:, None] * (cols // BS) + i_b[None, :]
    m_s = m_r[:, None] & (i_b < cols // BS)[None, :]
    b_s = tl.load(s_ptr + p_s, mask=m_s, other=0.0)

    b_v = tl.reshape(b_w, (BR, BC // BS, BS)) * b_s[:, :, None] + tl.reshape(b_p * scale, (BR, BC // BS, BS))
    b_max = tl.max(tl.abs(b_v), axis=2)
    broken = tl.sum((b_v != b_v).to(tl.int32), axis=2)  # a maximum passes over NaN
    b_max = tl.where(broken > 0, float("nan"), b_max)
    tl.store(s_out_ptr + p_s, b_max, mask=m_s)
    if CODES:
        b_least = tl.full((BR, BC // BS), 1e-38, tl.float32)  # as a number it is an fp64 one to older Triton
        b_inv = tl.math.div_rn(tl.full((BR, BC // BS), 1.0, tl.float32), tl.maximum(b_max, b_least))
        b_x = tl.minimum(tl.maximum(b_v * b_inv[:, :, None], -1.0), 1.0)
        b_q = tl.zeros((BR, BC // BS, BS), dtype=tl.int32)
        for i in tl.static_range(15):
            b_q += (b_x > tl.load(m_ptr + i)).to(tl.int32)
        if not SORTED:
            b_q = tl.load(o_ptr + b_q).to(tl.int32)
        high, low = tl.split(tl.reshape(b_q, (BR, BC // 2, 2)))
        tl.store(c_out_ptr + p_c, ((high << 4) | low).to(tl.uint8), mask=m_h)


def launch(
    codes: torch.Tensor,
    scales: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    table: Sequence[float],
    block_size: int,
    *,
    only_scales: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments as `nf4_merge`, whose checks it relies on. The codes are unset with `only_scales`."""
    rows, cols, device = len(left), right.shape[1], codes.device
    order, midpoints = ranking(table)
    values, between = (torch.tensor(numbers, dtype=torch.float32, device=device) for numbers in (table, midpoints))
    ranks = torch.tensor(order, dtype=torch.uint8, device=device)
    found_codes, found_scales = torch.empty_like(codes), torch.empty_like(scales)
    constants = _constants(block_size, order == sorted(order), not only_scales)
    if scales.numel():
        grid = (triton.cdiv(cols, constants["BC"]), triton.cdiv(rows, constants["BR"]))
        kernel[grid](
            codes.contiguous(), scales.contiguous(), left.contiguous(), right.contiguous(), values, between, ranks,
            found_codes, found_scales, rows, cols, left.shape[1], scale, **constants, **OPTIONS,
        )  # fmt: skip
    return found_codes, found_scales


def _constants(block_size: int, in_order: bool, codes: bool) -> dict[str, Any]:
    columns = max(64, block_size)
    return {"BR": TILE // columns, "BC": columns, "BK": RANK, "BS": block_size, "SORTED": in_order, "CODES": codes}


def builds() -> dict[str, dict[str, Any]]:
    """Every form of the kernel that is shipped, by name, as arguments of an ahead-of-time build."""
    pointers = {
        "c_ptr": "*u8", "s_ptr": "*fp32", "l_ptr": "*fp32", "r_ptr": "*fp32", "t_ptr": "*fp32", "m_ptr": "*fp32",
        "o_ptr": "*u8", "c_out_ptr": "*u8", "s_out_ptr": "*fp32",
    }  # fmt: skip
    divisible = [["tt.divisibility", 16]]
    forms = {
        "nf4,32": (32, True, True), "nf4,64": (64, True, True), "nf4,128": (128, True, True),
        "nf4,256": (256, True, True), "fp4,64": (64, False, True), "nf4,64,scales": (64, True, False),
    }  # fmt: skip
    return {
        f"nf4_merge[{name}]": {
            "function": kernel,
            "signature": {
                **pointers, "rows": "i32", "cols": "i32", "rank": "i32", "scale": "fp32",
                **dict.fromkeys(_constants(*form), "constexpr"),
            },
            "constants": _constants(*form),
            "attributes": {(index,): divisible for index in (*range(9), 10, 11)},
            "options": OPTIONS,
        }
        for name, form in forms.items()
    }  # fmt: skip
