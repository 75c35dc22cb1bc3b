"""The one-bin loss of a Fourier head: the negative log-probability of a bin, in O(frequencies) a row.

    a_l = u_l + i·u_(K+l), l = 0 .. K-1         A_y = Σ_l a_l e^(iπ l z_y),  z_y = -1 + (2y + 1) / m
    c₀ = Σ |a_l|²                               P_y = |A_y|² / (m c₀),       P_y = 1/m where c₀ = 0
    loss = -log((P_y + ε) / (1 + f))            ε = f / m, with f the mass of the floor

With fewer frequencies than bins Σ_j |A_j|² = m c₀ (roots of unity), so P_y needs no other bin. The gradient, with
g = -1 / (P_y + ε), φ_l = π l z_y and A = Ar + i·Ai:

    ∂/∂u_l      = g·(2 (Ar cos φ_l + Ai sin φ_l) / (m c₀) - 2 P_y u_l / c₀)
    ∂/∂u_(K+l)  = g·(2 (Ai cos φ_l - Ar sin φ_l) / (m c₀) - 2 P_y u_(K+l) / c₀)

The density is that of the Fourier head (Gillman et al., ICLR 2025, arXiv 2410.22269), written as a squared amplitude.
Angles are reduced as whole numbers, l (2y + 1 - m) modulo 2m, so they are exact at any frequency; sums are fp32 (fp64
for fp64 coefficients) whatever the dtype of u. Rows whose label is `ignore_index` cost nothing.
"""

from __future__ import annotations

import importlib.util
import math
import os
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from packaging.version import Version

Implementation = Literal["auto", "torch", "triton"]
Reduction = Literal["mean", "sum", "none"]

TINY = 1e-30
"""c₀ below this is no direction: the density is uniform."""

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_OLDEST_TRITON = Version("3.3")
"""The compiler of 3.2 ends the whole process over the logits' products."""
_MAX_PHASE = 1 << 29
_ROWS = 1 << 13
"""Up to so many frequencies x bins a table has a row of phases for every bin: rows are copied faster than angles."""


class Sums(NamedTuple):
    """What the backward pass keeps: Ar, Ai and c₀ of every row, [T] each."""

    real: torch.Tensor
    imaginary: torch.Tensor
    energy: torch.Tensor


def reference_masses(coefficients: torch.Tensor, bins: int) -> torch.Tensor:
    """The specification of the masses of all bins, [R, bins]: every exponential written out."""
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    real, imaginary = coefficients.to(wide).chunk(2, -1)
    frequencies = torch.arange(real.shape[-1], device=real.device)
    angles = math.pi * torch.outer(frequencies, 2 * torch.arange(bins, device=real.device) + 1 - bins).to(wide) / bins
    cos, sin = angles.cos(), angles.sin()
    squares = (real @ cos - imaginary @ sin) ** 2 + (real @ sin + imaginary @ cos) ** 2
    energy = (real**2 + imaginary**2).sum(-1, keepdim=True)
    return torch.where(energy > TINY, squares / (bins * energy.clamp_min(TINY)), 1 / bins)


def reference(
    coefficients: torch.Tensor,
    labels: torch.Tensor,
    bins: int,
    *,
    floor: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> torch.Tensor:
    """The specification of `fourier_nll`: every bin of every row, then the one that counts."""
    masses = reference_masses(coefficients, bins)
    counted = labels != ignore_index
    chosen = masses.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    losses = torch.where(counted, -torch.log((chosen + floor / bins) / (1 + floor)), 0.0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def fourier_nll(
    coefficients: torch.Tensor,
    labels: torch.Tensor,
    bins: int,
    *,
    floor: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Negative log-probability of bins under densities given by Fourier coefficients, differentiable once.

    Shapes: T rows, K = frequencies + 1, m bins.

    Args:
        coefficients: u [T, 2K], real parts and then imaginary parts, any float dtype.
        labels: [T] int64, bins 0 to m - 1.
        bins: m, above frequencies.
        floor: f, the mass that is shared out evenly among the bins, 0 or more.
        ignore_index: the label of rows that do not count.
        reduction: `mean` over the rows that count (NaN without any), `sum`, or `none`: [T], 0 where ignored.
        implementation: `auto` takes Triton for CUDA tensors that its kernels support and torch elsewhere.

    Memory beyond operands and gradient: three numbers a row with Triton; in torch cosines and sines, as large as u.

    Raises:
        ValueError: shapes, dtypes or options do not fit; as many frequencies as bins.
        IndexError: a label that is no bin.
        RuntimeError: `triton` is asked for where it cannot run; a gradient of the gradient.
    """
    check(coefficients, bins, floor)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is mean, sum or none, not {reduction!r}")
    if labels.shape != coefficients.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels are int64 [{len(coefficients)}], one a row, not {labels.dtype} {list(labels.shape)}")
    rows = (labels != ignore_index).nonzero().squeeze(1)
    kept = labels.index_select(0, rows)
    _check_labels(kept, rows, bins)
    wanted = coefficients if len(rows) == len(labels) else coefficients.index_select(0, rows)
    losses = _Losses.apply(wanted, kept, bins, floor, chosen(implementation, coefficients))  # type: ignore[no-untyped-call]
    if reduction == "none":
        spread: torch.Tensor = losses.new_zeros(len(labels)).index_copy(0, rows, losses)
        return spread
    total: torch.Tensor = losses.sum()
    return total if reduction == "sum" else total / len(rows)


def phases(labels: torch.Tensor, count: int, bins: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, count] of π l z_y for bins y [T] and l = 0 .. count - 1, from a table of 2m exact angles."""
    if count * bins > _ROWS:
        return _looked_up(labels, count, bins, dtype)
    cos, sin = _rows(count, bins, dtype, labels.device)
    return cos.index_select(0, labels), sin.index_select(0, labels)


def _looked_up(labels: torch.Tensor, count: int, bins: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = _table(bins, dtype, labels.device)
    places = torch.outer(2 * labels + 1 - bins, torch.arange(count, device=labels.device)).remainder_(2 * bins)
    return cos[places], sin[places]


@lru_cache(maxsize=16)
def _rows(count: int, bins: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The phases of every bin, [m, count] each."""
    with torch.inference_mode(False):
        return _looked_up(torch.arange(bins, device=device), count, bins, dtype)


@lru_cache(maxsize=16)
def _table(bins: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of all multiples of π / m; made once, since 2m of them cost as much as 64 rows of sums."""
    with torch.inference_mode(False):
        angles = torch.arange(2 * bins, device=device, dtype=torch.float64) * (math.pi / bins)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def check(coefficients: torch.Tensor, bins: int, floor: float) -> None:
    """Whether coefficients [T, 2K] describe a density over `bins` bins.

    Raises:
        ValueError: they do not.
    """
    if coefficients.ndim != 2 or coefficients.shape[1] % 2 or not coefficients.shape[1]:
        raise ValueError(f"coefficients are [rows, 2 * (frequencies + 1)], not {list(coefficients.shape)}")
    if not coefficients.is_floating_point():
        raise ValueError(f"coefficients are floats, not {coefficients.dtype}")
    frequencies = coefficients.shape[1] // 2 - 1
    if frequencies >= bins:
        raise ValueError(f"{frequencies} frequencies need more than {frequencies} bins, not {bins}")
    if (frequencies + 1) * 2 * bins > _MAX_PHASE:
        raise ValueError(f"frequencies times bins is below 2**28, not {frequencies} x {bins}")
    if not 0 <= floor < math.inf:
        raise ValueError(f"floor is a mass, 0 or more, not {floor}")


def chosen(implementation: Implementation, coefficients: torch.Tensor) -> Literal["torch", "triton"]:
    """What computes.

    Raises:
        ValueError: no such implementation.
        RuntimeError: `triton` is asked for where it cannot run.
    """
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"implementation is auto, torch or triton, not {implementation!r}")
    fault = _triton_fault(coefficients)
    if implementation == "triton" and fault:
        raise RuntimeError(f"the Triton implementation of the Fourier head cannot run: {fault}")
    if implementation == "auto":
        return "torch" if fault or not coefficients.is_cuda else "triton"
    return implementation


def _triton_fault(coefficients: torch.Tensor) -> str:
    if coefficients.dtype not in _TRITON_DTYPES:
        return f"its kernels do not take {coefficients.dtype}"
    if not coefficients.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {coefficients.device}, not on a CUDA device"
    if not importlib.util.find_spec("triton"):
        return "triton is not installed"
    import triton

    too_old = Version(triton.__version__) < _OLDEST_TRITON
    return f"Triton {triton.__version__} is older than {_OLDEST_TRITON}" if too_old else ""


def _check_labels(labels: torch.Tensor, rows: torch.Tensor, bins: int) -> None:
    outside = ((labels < 0) | (labels >= bins)).nonzero().squeeze(1)
    if len(outside):
        first = int(outside[0])
        raise IndexError(f"label {int(labels[first])} of row {int(rows[first])} is none of the {bins} bins")


class _Losses(torch.autograd.Function):
    """Losses [N] of rows that all count."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: torch.Tensor, labels: torch.Tensor, bins: int, floor: float, implementation: str
    ) -> torch.Tensor:
        ctx.bins, ctx.floor, ctx.implementation = bins, floor, implementation
        losses, sums = _forward(coefficients, labels, bins, floor, implementation)
        ctx.save_for_backward(coefficients, labels, *sums)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fourier_nll has a first derivative only; for a gradient of the gradient (create_graph=True) use "
                "regraft.kernels.fourier_nll.reference"
            )
        coefficients, labels, *sums = ctx.saved_tensors
        upstream = torch.zeros_like(upstream) if not len(labels) else upstream  # a mean of nothing sends infinity
        gradient = _backward(coefficients, labels, Sums(*sums), upstream, ctx.bins, ctx.floor, ctx.implementation)
        return gradient, None, None, None, None


def _forward(
    coefficients: torch.Tensor, labels: torch.Tensor, bins: int, floor: float, implementation: str
) -> tuple[torch.Tensor, Sums]:
    if implementation == "triton" and len(labels):
        from regraft.kernels import fourier_nll_triton as fused

        with torch.cuda.device_of(coefficients):  # type: ignore[no-untyped-call]
            return fused.forward(coefficients, labels, bins, floor)
    real, imaginary, cos, sin = _parts(coefficients, labels, bins)
    amplitude = (real * cos - imaginary * sin).sum(1), (real * sin + imaginary * cos).sum(1)
    sums = Sums(*amplitude, (real * real + imaginary * imaginary).sum(1))
    return -torch.log((_mass(sums, bins) + floor / bins) / (1 + floor)), sums


def _backward(
    coefficients: torch.Tensor,
    labels: torch.Tensor,
    sums: Sums,
    upstream: torch.Tensor,
    bins: int,
    floor: float,
    implementation: str,
) -> torch.Tensor:
    if implementation == "triton" and len(labels):
        from regraft.kernels import fourier_nll_triton as fused

        with torch.cuda.device_of(coefficients):  # type: ignore[no-untyped-call]
            return fused.backward(coefficients, labels, sums, upstream, bins, floor)
    real, imaginary, cos, sin = _parts(coefficients, labels, bins)
    mass, energy = _mass(sums, bins), sums.energy.clamp_min(TINY)
    factor = torch.where(sums.energy > TINY, -2 * upstream / (mass.clamp_min(TINY) + floor / bins), 0.0)
    inner = (factor / (bins * energy))[:, None]
    radial = (factor * mass / energy)[:, None]
    ours = (inner * (sums.real[:, None] * cos + sums.imaginary[:, None] * sin) - radial * real).to(coefficients.dtype)
    theirs = inner * (sums.imaginary[:, None] * cos - sums.real[:, None] * sin) - radial * imaginary
    return torch.cat([ours, theirs.to(coefficients.dtype)], 1)


def _parts(
    coefficients: torch.Tensor, labels: torch.Tensor, bins: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    real, imaginary = coefficients.to(wide).chunk(2, 1)
    return real, imaginary, *phases(labels, real.shape[1], bins, wide)


def _mass(sums: Sums, bins: int) -> torch.Tensor:
    squares = sums.real * sums.real + sums.imaginary * sums.imaginary
    return torch.where(sums.energy > TINY, squares / (bins * sums.energy.clamp_min(TINY)), 1 / bins)
