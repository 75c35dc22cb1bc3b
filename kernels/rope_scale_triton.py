"""The Triton kernel of `rope_scale`, forward and backward: x is read once, y written once.

A program takes ROWS positions of heads, both halves of the rotary dimensions and what is behind them. Formulas and
rounding are those of `regraft.kernels.rope_scale`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from regraft.kernels.rounding_triton import round_to_nearest

ROWS = 16

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""Without fusion each product is rounded before the sum, as in the reference."""


@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    x_ptr, cos_ptr, sin_ptr, scale_ptr, out_ptr,  # noqa: ANN001
    rows, per_batch, length, width, half, table_step, scale_step,  # noqa: ANN001
    BR: tl.constexpr, BH: tl.constexpr, REST: tl.constexpr, SCALED: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """BR rows of x [rows, width]; tables [.., length, 2·half] and scale [.., length], a batch apart by the steps."""
    i_r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)
    i_h = tl.arange(0, BH)
    m_r, m_h = i_r < rows, i_h < half
    mask = m_r[:, None] & m_h[None, :]
    batch, position = i_r // per_batch, i_r % length
    p_x = i_r[:, None] * width + i_h[None, :]
    p_t = batch[:, None] * table_step + position[:, None] * (2 * half) + i_h[None, :]
    b_1 = tl.load(x_ptr + p_x, mask=mask, other=0.0).to(tl.float32)
    b_2 = tl.load(x_ptr + p_x + half, mask=mask, other=0.0).to(tl.float32)
    c_1 = tl.load(cos_ptr + p_t, mask=mask, other=0.0).to(tl.float32)
    c_2 = tl.load(cos_ptr + p_t + half, mask=mask, other=0.0).to(tl.float32)
    s_1 = tl.load(sin_ptr + p_t, mask=mask, other=0.0).to(tl.float32)
    s_2 = tl.load(sin_ptr + p_t + half, mask=mask, other=0.0).to(tl.float32)
    if TURNED:
        y_1 = b_1 * c_1 + b_2 * s_2
        y_2 = b_2 * c_2 - b_1 * s_1
    else:
        y_1 = b_1 * c_1 - b_2 * s_1
        y_2 = b_2 * c_2 + b_1 * s_2
    b_t = tl.full((BR,), 1.0, dtype=tl.float32)
    if SCALED:
        b_t = tl.load(scale_ptr + batch * scale_step + position, mask=m_r, other=0.0).to(tl.float32)
        y_1 = y_1 * b_t[:, None]
        y_2 = y_2 * b_t[:, None]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + p_x, round_to_nearest(y_1, dtype), mask=mask)
    tl.store(out_ptr + p_x + half, round_to_nearest(y_2, dtype), mask=mask)
    if REST:
        for start in range(2 * half, width, BH):
            i_d = start + i_h
            m_d = m_r[:, None] & (i_d < width)[None, :]
            p_d = i_r[:, None] * width + i_d[None, :]
            b_y = tl.load(x_ptr + p_d, mask=m_d, other=0.0).to(tl.float32) * b_t[:, None]
            tl.store(out_ptr + p_d, round_to_nearest(b_y, dtype), mask=m_d)


def launch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: torch.Tensor | None, *, turned: bool
) -> torch.Tensor:
    """Run the kernel; arguments as `rope_scale`, whose checks it relies on; `turned` is the backward pass."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    scale = None if scale is None else scale.contiguous()
    batch, heads, length, width = x.shape
    half, rows = cos.shape[-1] // 2, batch * heads * length
    out = torch.empty_like(x)
    if rows and width:
        table_step = 0 if len(cos) == 1 else length * 2 * half
        scale_step = 0 if scale is None or len(scale) == 1 else length
        kernel[(triton.cdiv(rows, ROWS),)](
            x, cos, sin, scale, out, rows, heads * length, length, width, half, table_step, scale_step,
            BR=ROWS, BH=max(16, triton.next_power_of_2(half)), REST=width > 2 * half, SCALED=scale is not None,
            TURNED=turned, **OPTIONS,
        )  # fmt: skip
    return out


def builds() -> dict[str, dict[str, Any]]:
    """Every form of the kernel that is shipped, by name, as arguments of an ahead-of-time build: heads of 128."""
    found = {}
    for name in ("bf16", "fp16", "fp32"):
        for use, turned, rest in (("forward", False, False), ("backward", True, False), ("partial", False, True)):
            types = dict.fromkeys(("x_ptr", "out_ptr"), f"*{name}")
            types |= dict.fromkeys(("cos_ptr", "sin_ptr", "scale_ptr"), "*fp32")
            constants = {"BR": ROWS, "BH": 64, "REST": rest, "SCALED": True, "TURNED": turned}
            signature = {one: "constexpr" if one in constants else types.get(one, "i32") for one in kernel.arg_names}
            sizes = ("width", "half", "table_step")
            marked = [index for index, (one, kind) in enumerate(signature.items()) if kind[0] == "*" or one in sizes]
            found[f"rope_scale.{use}[{name}]"] = {
                "function": kernel,
                "signature": signature,
                "constants": constants,
                "attributes": {(index,): [["tt.divisibility", 16]] for index in marked},
                "options": OPTIONS,
            }
    return found
