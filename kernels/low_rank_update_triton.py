"""The Triton kernel of `low_rank_update`, and what is compiled ahead of time to check its use of registers.

One program computes one tile of the output: the weight is read once and written once, the product never leaves the
registers. Formula and rounding are those of `regraft.kernels.low_rank_update.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ROWS, COLS, RANK = 64, 64, 16
"""Tile of the output, and the step along the rank, which `tl.dot` wants to be 16 at least: 96 to 122 registers and no
spills (`benchmarks/kernel_resources.py`)."""

OPTIONS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
"""Without fusion s·P is rounded before W is added, as in the reference, whatever a triton version has as its default;
the dot itself is fused either way (read off the PTX)."""


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


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    w_ptr, l_ptr, r_ptr, out_ptr,  # noqa: ANN001
    rows, cols, rank, scale,  # noqa: ANN001
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BR, BC] of round(W + s·(L @ R)); W and out [rows, cols], L [rows, rank], R [rank, cols], row-major."""
    i_r = tl.program_id(1) * BR + tl.arange(0, BR)
    i_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_r, m_c = i_r < rows, i_c < cols
    b_p = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, rank, BK):
        i_k = start + tl.arange(0, BK)
        m_k = i_k < rank
        p_l = l_ptr + i_r.to(tl.int64)[:, None] * rank + i_k[None, :]
        p_r = r_ptr + i_k.to(tl.int64)[:, None] * cols + i_c[None, :]
        b_l = tl.load(p_l, mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_r = tl.load(p_r, mask=m_k[:, None] & m_c[None, :], other=0.0)
        b_p = tl.dot(b_l.to(tl.float32), b_r.to(tl.float32), b_p, input_precision="ieee")
    p_w = i_r.to(tl.int64)[:, None] * cols + i_c[None, :]
    mask = m_r[:, None] & m_c[None, :]
    b_w = tl.load(w_ptr + p_w, mask=mask, other=0.0).to(tl.float32)
    b_out = b_w + b_p * scale
    tl.store(out_ptr + p_w, round_to_nearest(b_out, out_ptr.dtype.element_ty), mask=mask)


def launch(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Run the kernel; arguments as `low_rank_update`, whose checks it relies on."""
    weight, left, right = weight.contiguous(), left.contiguous(), right.contiguous()
    rows, cols = weight.shape
    out = torch.empty_like(weight)
    if out.numel():
        grid = (triton.cdiv(cols, COLS), triton.cdiv(rows, ROWS))
        kernel[grid](weight, left, right, out, rows, cols, left.shape[1], scale, BR=ROWS, BC=COLS, BK=RANK, **OPTIONS)
    return out


def builds() -> dict[str, dict[str, Any]]:
    """Every form of the kernel that is shipped, by name, as arguments of an ahead-of-time build.

    The factors are fp32, as `LowRankDelta` brings them; pointers, columns and rank are marked as multiples of 16.
    """
    constants = {"BR": ROWS, "BC": COLS, "BK": RANK}
    divisible = [["tt.divisibility", 16]]
    return {
        f"low_rank_update[{weight}]": {
            "function": kernel,
            "signature": {
                "w_ptr": f"*{weight}", "l_ptr": "*fp32", "r_ptr": "*fp32", "out_ptr": f"*{weight}",
                "rows": "i32", "cols": "i32", "rank": "i32", "scale": "fp32", **dict.fromkeys(constants, "constexpr"),
            },
            "constants": constants,
            "attributes": {(index,): divisible for index in (0, 1, 2, 3, 5, 6)},
            "options": OPTIONS,
        }
        for weight in ("bf16", "fp16", "fp32")
    }  # fmt: skip
