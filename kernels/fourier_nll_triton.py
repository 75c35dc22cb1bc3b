"""The Triton kernels of `fourier_nll`: a program takes BT rows along all frequencies, cosines made on the way.

Formulas: `regraft.kernels.fourier_nll`. Forward keeps Ar, Ai and c₀, three numbers a row; backward makes the cosines
anew and writes the gradient. Nothing else of size rows x frequencies exists, and nothing of size rows x bins at all.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from regraft.kernels.fourier_nll import TINY, Sums
from regraft.kernels.rounding_triton import round_to_nearest

ROWS, FREQUENCIES = 8, 128
"""Rows of a program, and frequencies of a tile."""

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def sincos(turns, bins):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """cos and sin of π·turns / bins for whole numbers, |turns| < 2^29, to about 1e-7.

    The nearest quarter turn comes off as a whole number, so what the series see, up to π/4, is exact at any frequency.
    The hardware's own cosine of large angles would need a stack.
    """
    quarter = tl.floor(turns.to(tl.float32) * (2.0 / bins) + 0.5).to(tl.int32)
    x = (2 * turns - quarter * bins).to(tl.float32) * (1.5707963267948966 / bins)
    y = x * x
    sin = x + x * y * (-1.6666667e-1 + y * (8.3333310e-3 + y * (-1.9840874e-4 + y * 2.7525562e-6)))
    cos = 1.0 + y * (-0.5 + y * (4.1666668e-2 + y * (-1.3888889e-3 + y * (2.4801588e-5 - y * 2.7557319e-7))))
    odd = (quarter & 1) == 1
    c = tl.where(odd, sin, cos)
    s = tl.where(odd, cos, sin)
    c = tl.where(((quarter + 1) & 2) == 2, -c, c)
    s = tl.where((quarter & 2) == 2, -s, s)
    return c, s


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    u_ptr, y_ptr, loss_ptr, real_ptr, imaginary_ptr, energy_ptr,  # noqa: ANN001
    rows, count, bins, floor,  # noqa: ANN001
    TINY: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Losses [rows], Ar, Ai and c₀ of BT rows of u [rows, 2·count]."""
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = i_t < rows
    odd = 2 * tl.load(y_ptr + i_t, mask=m_t, other=0).to(tl.int32) + 1 - bins
    p_u = u_ptr + i_t.to(tl.int64)[:, None] * (2 * count)
    b_r = tl.zeros((BT, BK), dtype=tl.float32)
    b_i = tl.zeros((BT, BK), dtype=tl.float32)
    b_e = tl.zeros((BT, BK), dtype=tl.float32)
    for start in range(0, count, BK):
        i_k = start + tl.arange(0, BK)
        mask = m_t[:, None] & (i_k < count)[None, :]
        re = tl.load(p_u + i_k[None, :], mask=mask, other=0.0).to(tl.float32)
        im = tl.load(p_u + count + i_k[None, :], mask=mask, other=0.0).to(tl.float32)
        cos, sin = sincos(odd[:, None] * i_k[None, :], bins)
        b_r += re * cos - im * sin
        b_i += re * sin + im * cos
        b_e += re * re + im * im
    real, imaginary, energy = tl.sum(b_r, 1), tl.sum(b_i, 1), tl.sum(b_e, 1)
    mass = (real * real + imaginary * imaginary) / (bins * tl.maximum(energy, TINY))
    mass = tl.where(energy > TINY, mass, 1.0 / bins)
    loss = -tl.log((mass + floor / bins) / (1.0 + floor))
    tl.store(loss_ptr + i_t, loss, mask=m_t)
    tl.store(real_ptr + i_t, real, mask=m_t)
    tl.store(imaginary_ptr + i_t, imaginary, mask=m_t)
    tl.store(energy_ptr + i_t, energy, mask=m_t)


@triton.jit  # type: ignore[untyped-decorator]
def backward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    u_ptr, y_ptr, real_ptr, imaginary_ptr, energy_ptr, upstream_ptr, out_ptr,  # noqa: ANN001
    rows, count, bins, floor,  # noqa: ANN001
    TINY: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile [BT, BK] of frequencies, real and imaginary."""
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_t = i_t < rows
    mask = m_t[:, None] & (i_k < count)[None, :]
    odd = 2 * tl.load(y_ptr + i_t, mask=m_t, other=0).to(tl.int32) + 1 - bins
    real = tl.load(real_ptr + i_t, mask=m_t, other=0.0)
    imaginary = tl.load(imaginary_ptr + i_t, mask=m_t, other=0.0)
    energy = tl.load(energy_ptr + i_t, mask=m_t, other=1.0)
    upstream = tl.load(upstream_ptr + i_t, mask=m_t, other=0.0)
    mass = (real * real + imaginary * imaginary) / (bins * tl.maximum(energy, TINY))
    factor = tl.where(energy > TINY, -2.0 * upstream / (tl.maximum(mass, TINY) + floor / bins), 0.0)
    energy = tl.maximum(energy, TINY)
    inner = (factor / (bins * energy))[:, None]
    radial = (factor * mass / energy)[:, None]
    p_k = i_t.to(tl.int64)[:, None] * (2 * count) + i_k[None, :]
    re = tl.load(u_ptr + p_k, mask=mask, other=0.0).to(tl.float32)
    im = tl.load(u_ptr + p_k + count, mask=mask, other=0.0).to(tl.float32)
    cos, sin = sincos(odd[:, None] * i_k[None, :], bins)
    g_re = inner * (real[:, None] * cos + imaginary[:, None] * sin) - radial * re
    g_im = inner * (imaginary[:, None] * cos - real[:, None] * sin) - radial * im
    tl.store(out_ptr + p_k, round_to_nearest(g_re, out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + p_k + count, round_to_nearest(g_im, out_ptr.dtype.element_ty), mask=mask)


def forward(coefficients: torch.Tensor, labels: torch.Tensor, bins: int, floor: float) -> tuple[torch.Tensor, Sums]:
    """Losses [N] of at least one row, all labels bins, and what the backward pass needs."""
    coefficients, rows = coefficients.contiguous(), len(labels)
    loss, *sums = coefficients.new_empty((4, rows), dtype=torch.float32)
    forward_kernel[(triton.cdiv(rows, ROWS),)](
        coefficients, labels.contiguous(), loss, *sums, rows, coefficients.shape[1] // 2, bins, floor,
        TINY=TINY, BT=ROWS, BK=FREQUENCIES, **OPTIONS,
    )  # fmt: skip
    return loss, Sums(*sums)


def backward(
    coefficients: torch.Tensor, labels: torch.Tensor, sums: Sums, upstream: torch.Tensor, bins: int, floor: float
) -> torch.Tensor:
    """The gradient [N, 2K] for the losses' gradient `upstream` [N], in the dtype of the coefficients."""
    coefficients, rows = coefficients.contiguous(), len(labels)
    count, gradient = coefficients.shape[1] // 2, torch.empty_like(coefficients)
    backward_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(count, FREQUENCIES))](
        coefficients, labels.contiguous(), *sums, upstream.float().contiguous(), gradient, rows, count, bins, floor,
        TINY=TINY, BT=ROWS, BK=FREQUENCIES, **OPTIONS,
    )  # fmt: skip
    return gradient


def builds() -> dict[str, dict[str, Any]]:
    """Every form of the kernels that is shipped, by name, as arguments of an ahead-of-time build."""
    found = {}
    for name in _NAMES.values():
        types = {"u_ptr": f"*{name}", "y_ptr": "*i64", "out_ptr": f"*{name}", "floor": "fp32"}
        for kind, function in (("forward", forward_kernel), ("backward", backward_kernel)):
            constants = {"TINY": TINY, "BT": ROWS, "BK": FREQUENCIES}
            found[f"fourier_nll.{kind}[{name}]"] = build(function, types, constants, OPTIONS)
    return found


def build(function: Any, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Pointers without a type are fp32, other arguments 32-bit sizes; both are marked as multiples of 16."""
    signature = {}
    for name in function.arg_names:
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, default)
    marked = [index for index, kind in enumerate(signature.values()) if kind[0] == "*" or kind == "i32"]
    return {
        "function": function,
        "signature": signature,
        "constants": constants,
        "attributes": {(index,): [["tt.divisibility", 16]] for index in marked},
        "options": options,
    }
