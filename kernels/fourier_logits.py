"""The log-probabilities of all bins of a Fourier head, with its gate: what stands in the logits of a hybrid head.

    A_j = Σ_l a_l e^(iπ l z_j)      P_j = |A_j|² / (m c₀)      logits_j = gate + log((P_j + ε) / (1 + f)),  ε = f / m

Symbols as in `regraft.kernels.fourier_nll`. In torch the A_j are one inverse FFT of length m; in Triton one product of
u [T, 2K] with cosines and sines that are made tile by tile and never stored. The gradient, with Q_j = G_j / (P_j + ε)
for the gradient G of the logits and S_l = Σ_j Q_j A_j e^(-iπ l z_j), the FFT the other way:

    ∂/∂u_l     = 2 Re S_l / (m c₀) - 2 u_l / c₀ · Σ_j Q_j P_j
    ∂/∂u_(K+l) = 2 Im S_l / (m c₀) - 2 u_(K+l) / c₀ · Σ_j Q_j P_j         ∂/∂gate = Σ_j G_j

Memory is that of the result, rows x bins, never rows x bins x frequencies.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from regraft.kernels.fourier_nll import TINY, Implementation, check, chosen, reference_masses


def reference(
    coefficients: torch.Tensor, bins: int, *, floor: float = 0.0, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """The specification of `fourier_logits`: every exponential written out."""
    masses = reference_masses(coefficients, bins)
    logits = torch.log((masses + floor / bins) / (1 + floor))
    return logits if gate is None else logits + gate[:, None].to(logits.dtype)


def fourier_logits(
    coefficients: torch.Tensor,
    bins: int,
    *,
    floor: float = 0.0,
    gate: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Log-probabilities [T, m] of all bins, plus the gate; differentiable once; fp32 (fp64 for fp64 coefficients).

    Args:
        coefficients: u [T, 2K], real parts and then imaginary parts, any float dtype.
        bins: m, above frequencies.
        floor: f, the mass that is shared out evenly among the bins.
        gate: [T], added to all bins of a row.
        out: where the result is written, such as columns of wider logits; [T, m] fp32, its rows contiguous. Only
            without gradients.
        implementation: `auto` takes Triton for CUDA tensors that its kernels support and torch elsewhere.

    Raises:
        ValueError: shapes, dtypes or options do not fit; as many frequencies as bins.
        RuntimeError: `triton` is asked for where it cannot run; `out` with gradients; a gradient of the gradient.
    """
    check(coefficients, bins, floor)
    implementation = chosen(implementation, coefficients)
    if gate is not None and gate.shape != coefficients.shape[:1]:
        raise ValueError(f"the gate is [{len(coefficients)}], one number a row, not {list(gate.shape)}")
    learns = coefficients.requires_grad or (gate is not None and gate.requires_grad)
    if out is not None and learns and torch.is_grad_enabled():
        raise RuntimeError("fourier_logits writes into `out` only where no gradient is asked for")
    if out is not None:
        _check_out(out, coefficients, bins)
        return _forward(coefficients, gate, bins, floor, implementation, out)
    logits: torch.Tensor = _Logits.apply(coefficients, gate, bins, floor, implementation)  # type: ignore[no-untyped-call]
    return logits


def amplitudes(coefficients: torch.Tensor, bins: int) -> torch.Tensor:
    """A [..., m], complex, at the centres of m bins: one inverse FFT of length m, O(m log m) a row."""
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    real, imaginary = coefficients.to(wide).chunk(2, -1)
    turned = torch.complex(real, imaginary) * _twist(real.shape[-1], bins, real)
    found: torch.Tensor = torch.fft.ifft(turned, n=bins, norm="forward")
    return found


def _twist(count: int, bins: int, like: torch.Tensor) -> torch.Tensor:
    """e^(iπ l z_0), z_0 the first centre, from angles reduced as whole numbers."""
    places = (torch.arange(count, device=like.device) * (1 - bins)).remainder(2 * bins).double() * (math.pi / bins)
    return torch.complex(places.cos().to(like.dtype), places.sin().to(like.dtype))


def _check_out(out: torch.Tensor, coefficients: torch.Tensor, bins: int) -> None:
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    if out.shape != (len(coefficients), bins) or out.dtype != wide or (bins > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out is {wide} [{len(coefficients)}, {bins}] with contiguous rows, not {out.dtype} {list(out.shape)} "
            f"with strides {out.stride()}"
        )


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, coefficients: torch.Tensor, gate: torch.Tensor | None, bins: int, floor: float, implementation: str
    ) -> torch.Tensor:
        ctx.bins, ctx.floor, ctx.implementation = bins, floor, implementation
        ctx.gate = None if gate is None else gate.dtype
        ctx.save_for_backward(coefficients)
        return _forward(coefficients, gate, bins, floor, implementation, None)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "fourier_logits has a first derivative only; for a gradient of the gradient (create_graph=True) use "
                "regraft.kernels.fourier_logits.reference"
            )
        gradient = None
        if ctx.needs_input_grad[0]:
            (coefficients,) = ctx.saved_tensors
            gradient = _backward(coefficients, upstream, ctx.bins, ctx.floor, ctx.implementation)
        gate = upstream.sum(1).to(ctx.gate) if ctx.needs_input_grad[1] else None
        return gradient, gate, None, None, None


def _forward(
    coefficients: torch.Tensor,
    gate: torch.Tensor | None,
    bins: int,
    floor: float,
    implementation: str,
    out: torch.Tensor | None,
) -> torch.Tensor:
    if implementation == "triton" and len(coefficients):
        from regraft.kernels import fourier_logits_triton as fused

        with torch.cuda.device_of(coefficients):  # type: ignore[no-untyped-call]
            return fused.forward(coefficients, gate, bins, floor, out)
    masses, _, _ = _masses(coefficients, bins)
    logits = masses.add_(floor / bins).log_().sub_(math.log1p(floor))
    if gate is not None:
        logits += gate[:, None].to(logits.dtype)
    return logits if out is None else out.copy_(logits)


def _backward(
    coefficients: torch.Tensor, upstream: torch.Tensor, bins: int, floor: float, implementation: str
) -> torch.Tensor:
    if implementation == "triton" and len(coefficients):
        from regraft.kernels import fourier_logits_triton as fused

        with torch.cuda.device_of(coefficients):  # type: ignore[no-untyped-call]
            return fused.backward(coefficients, upstream, bins, floor)
    masses, found, energy = _masses(coefficients, bins)
    weights = torch.where(energy > TINY, upstream / (masses.clamp_min(TINY) + floor / bins), 0.0)
    half = coefficients.shape[1] // 2
    twist = _twist(half, bins, energy).conj()
    turned = torch.fft.fft(weights * found)[:, :half] * twist
    energy = energy.clamp_min(TINY)
    gradient = torch.cat([turned.real, turned.imag], 1) / (0.5 * bins * energy)
    gradient -= coefficients * (2 / energy * (weights * masses).sum(1, keepdim=True))
    return gradient.to(coefficients.dtype)


def _masses(coefficients: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P [T, m], A [T, m] and c₀ [T, 1]."""
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    found = amplitudes(coefficients, bins)
    energy = coefficients.to(wide).square().sum(1, keepdim=True)
    squares = found.real.square() + found.imag.square()
    return torch.where(energy > TINY, squares / (bins * energy.clamp_min(TINY)), 1 / bins), found, energy
