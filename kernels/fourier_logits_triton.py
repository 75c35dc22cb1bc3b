"""The Triton kernels of `fourier_logits`: products whose right factor, cosines and sines, is made tile by tile.

    forward    Ar = re C - im S and Ai = re S + im C of a tile of rows and bins; its log-probabilities are the epilogue
    weigh      the same tile again, times Q = G / (P + ε), stored as Q·Ar and Q·Ai; and Σ_j Q P of the tile
    adjoint    re = (Q·Ar) Cᵀ + (Q·Ai) Sᵀ and im = (Q·Ai) Cᵀ - (Q·Ar) Sᵀ of a tile of rows and frequencies

Formulas: `regraft.kernels.fourier_logits`. Coefficients come as fp32, small beside the result. Products are tf32 in
three parts, as exact as fp32 and on tensor cores.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from regraft.kernels.fourier_nll import TINY
from regraft.kernels.fourier_nll_triton import build, sincos

ROWS, BINS, DEPTH = 16, 32, 32
"""Rows and columns of a tile, and how much of the sum is made at once: 161 to 167 registers, so three blocks fit; 64
columns take 205 to 225, and a depth of 64 spills."""

OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


@triton.jit  # type: ignore[untyped-decorator]
def amplitude_tile(  # type: ignore[no-untyped-def]  # noqa: ANN201
    u_ptr, i_t, i_j, rows, count, bins,  # noqa: ANN001
    BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Ar and Ai [BT, BJ] of rows i_t and bins i_j, and c₀ [BT]; u [rows, 2·count] row-major."""
    m_t = i_t < rows
    p_u = u_ptr + i_t.to(tl.int64)[:, None] * (2 * count)
    odd = 2 * i_j + 1 - bins
    b_r = tl.zeros((BT, BJ), dtype=tl.float32)
    b_i = tl.zeros((BT, BJ), dtype=tl.float32)
    b_e = tl.zeros((BT, BK), dtype=tl.float32)
    for start in range(0, count, BK):
        i_k = start + tl.arange(0, BK)
        mask = m_t[:, None] & (i_k < count)[None, :]
        re = tl.load(p_u + i_k[None, :], mask=mask, other=0.0).to(tl.float32)
        im = tl.load(p_u + count + i_k[None, :], mask=mask, other=0.0).to(tl.float32)
        cos, sin = sincos(i_k[:, None] * odd[None, :], bins)
        b_r = tl.dot(re, cos, b_r, input_precision=DOT)
        b_r = tl.dot(-im, sin, b_r, input_precision=DOT)
        b_i = tl.dot(re, sin, b_i, input_precision=DOT)
        b_i = tl.dot(im, cos, b_i, input_precision=DOT)
        b_e += re * re + im * im
    return b_r, b_i, tl.sum(b_e, 1)


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    u_ptr, gate_ptr, out_ptr,  # noqa: ANN001
    rows, count, bins, stride, floor,  # noqa: ANN001
    TINY: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BJ] of the logits, whose rows lie `stride` apart."""
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    m_t = i_t < rows
    b_r, b_i, energy = amplitude_tile(u_ptr, i_t, i_j, rows, count, bins, BT, BJ, BK, DOT)
    mass = (b_r * b_r + b_i * b_i) / (bins * tl.maximum(energy, TINY))[:, None]
    mass = tl.where((energy > TINY)[:, None], mass, 1.0 / bins)
    logits = tl.log((mass + floor / bins) / (1.0 + floor))
    if GATED:
        logits += tl.load(gate_ptr + i_t, mask=m_t, other=0.0).to(tl.float32)[:, None]
    p_out = out_ptr + i_t.to(tl.int64)[:, None] * stride + i_j[None, :]
    tl.store(p_out, logits, mask=m_t[:, None] & (i_j < bins)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def weigh_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    u_ptr, g_ptr, real_ptr, imaginary_ptr, radial_ptr, energy_ptr,  # noqa: ANN001
    rows, count, bins, floor,  # noqa: ANN001
    TINY: tl.constexpr, BT: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of Q·Ar and Q·Ai [rows, bins]; its Σ_j Q P [tiles, rows]; c₀ [rows]."""
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    m_t = i_t < rows
    mask = m_t[:, None] & (i_j < bins)[None, :]
    b_r, b_i, energy = amplitude_tile(u_ptr, i_t, i_j, rows, count, bins, BT, BJ, BK, DOT)
    mass = (b_r * b_r + b_i * b_i) / (bins * tl.maximum(energy, TINY))[:, None]
    p_tile = i_t.to(tl.int64)[:, None] * bins + i_j[None, :]
    weight = tl.load(g_ptr + p_tile, mask=mask, other=0.0) / (tl.maximum(mass, TINY) + floor / bins)
    weight = tl.where((energy > TINY)[:, None], weight, 0.0)
    tl.store(real_ptr + p_tile, weight * b_r, mask=mask)
    tl.store(imaginary_ptr + p_tile, weight * b_i, mask=mask)
    tl.store(radial_ptr + tl.program_id(1).to(tl.int64) * rows + i_t, tl.sum(weight * mass, 1), mask=m_t)
    tl.store(energy_ptr + i_t, energy, mask=m_t)


@triton.jit  # type: ignore[untyped-decorator]
def adjoint_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    u_ptr, real_ptr, imaginary_ptr, radial_ptr, energy_ptr, out_ptr,  # noqa: ANN001
    rows, count, bins,  # noqa: ANN001
    TINY: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BK] of the gradient, real and imaginary; radial [rows] is Σ_j Q P."""
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_t = i_t < rows
    p_row = i_t.to(tl.int64)[:, None] * bins
    b_r = tl.zeros((BT, BK), dtype=tl.float32)
    b_i = tl.zeros((BT, BK), dtype=tl.float32)
    for start in range(0, bins, BJ):
        i_j = start + tl.arange(0, BJ)
        mask = m_t[:, None] & (i_j < bins)[None, :]
        w_r = tl.load(real_ptr + p_row + i_j[None, :], mask=mask, other=0.0)
        w_i = tl.load(imaginary_ptr + p_row + i_j[None, :], mask=mask, other=0.0)
        odd = 2 * i_j + 1 - bins
        cos, sin = sincos(odd[:, None] * i_k[None, :], bins)
        b_r = tl.dot(w_r, cos, b_r, input_precision=DOT)
        b_r = tl.dot(w_i, sin, b_r, input_precision=DOT)
        b_i = tl.dot(w_i, cos, b_i, input_precision=DOT)
        b_i = tl.dot(-w_r, sin, b_i, input_precision=DOT)
    energy = tl.maximum(tl.load(energy_ptr + i_t, mask=m_t, other=1.0), TINY)
    radial = tl.load(radial_ptr + i_t, mask=m_t, other=0.0)
    inner, outer = (2.0 / (bins * energy))[:, None], (2.0 * radial / energy)[:, None]
    p_k = i_t.to(tl.int64)[:, None] * (2 * count) + i_k[None, :]
    mask = m_t[:, None] & (i_k < count)[None, :]
    re = tl.load(u_ptr + p_k, mask=mask, other=0.0).to(tl.float32)
    im = tl.load(u_ptr + p_k + count, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + p_k, inner * b_r - outer * re, mask=mask)
    tl.store(out_ptr + p_k + count, inner * b_i - outer * im, mask=mask)


def forward(
    coefficients: torch.Tensor, gate: torch.Tensor | None, bins: int, floor: float, out: torch.Tensor | None
) -> torch.Tensor:
    """The logits [T, m] of at least one row."""
    coefficients, rows = coefficients.float().contiguous(), len(coefficients)
    if out is None:
        out = coefficients.new_empty((rows, bins), dtype=torch.float32)
    forward_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(bins, BINS))](
        coefficients, None if gate is None else gate.float().contiguous(), out, rows, coefficients.shape[1] // 2, bins,
        out.stride(0), floor, TINY=TINY, **_tile(), GATED=gate is not None, **OPTIONS,
    )  # fmt: skip
    return out


def backward(coefficients: torch.Tensor, upstream: torch.Tensor, bins: int, floor: float) -> torch.Tensor:
    """The gradient [T, 2K] for the logits' gradient `upstream` [T, m]; two numbers a bin stand in memory meanwhile."""
    dtype, coefficients, rows = coefficients.dtype, coefficients.float().contiguous(), len(coefficients)
    count, tiles = coefficients.shape[1] // 2, triton.cdiv(bins, BINS)
    real, imaginary = coefficients.new_empty((2, rows, bins), dtype=torch.float32)
    radial = coefficients.new_empty((tiles, rows), dtype=torch.float32)
    energy, gradient = torch.empty_like(radial[0]), torch.empty_like(coefficients)
    weigh_kernel[(triton.cdiv(rows, ROWS), tiles)](
        coefficients, upstream.float().contiguous(), real, imaginary, radial, energy, rows, count, bins, floor,
        TINY=TINY, **_tile(), **OPTIONS,
    )  # fmt: skip
    adjoint_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(count, BINS))](
        coefficients, real, imaginary, radial.sum(0), energy, gradient, rows, count, bins,
        TINY=TINY, BT=ROWS, BK=BINS, BJ=DEPTH, DOT=_dot(), **OPTIONS,
    )  # fmt: skip
    return gradient.to(dtype)


def _tile() -> dict[str, Any]:
    return {"BT": ROWS, "BJ": BINS, "BK": DEPTH, "DOT": _dot()}


def _dot() -> str:
    """How products are made; the interpreter has fp32 alone, and so has hardware other than NVIDIA's."""
    return "ieee" if os.environ.get("TRITON_INTERPRET") == "1" or torch.version.hip else "tf32x3"


def builds() -> dict[str, dict[str, Any]]:
    """Every form of the kernels that is shipped, by name, as arguments of an ahead-of-time build."""
    tile: dict[str, Any] = {"TINY": TINY, "BT": ROWS, "BJ": BINS, "BK": DEPTH, "DOT": "tf32x3"}
    kinds = {
        "forward": (forward_kernel, tile | {"GATED": True}),
        "weigh": (weigh_kernel, tile),
        "adjoint": (adjoint_kernel, tile | {"BK": BINS, "BJ": DEPTH}),
    }
    return {
        f"fourier_logits.{name}[fp32]": build(function, {"floor": "fp32"}, constants, OPTIONS)
        for name, (function, constants) in kinds.items()
    }
