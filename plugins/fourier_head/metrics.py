"""The figures by which the paper compares heads: smoothness, KL, squared error of the expected bin."""

from __future__ import annotations

import math

import torch

_SCALES = 100


def smoothness(masses: torch.Tensor) -> torch.Tensor:
    """s(P) [...] = Σ_σ 6 / (π² σ²) · ‖P - G_σ * P‖₂, σ = 1 .. 100 bins; lower is smoother.

    G_σ is a Gaussian cut off at m - 1 bins and normalised, and the bins wrap around, as in the paper's code: there one
    call of `scipy.ndimage.gaussian_filter1d` for each σ, here one product with their joint spectrum.

    Args:
        masses: [..., m], each row a distribution.
    """
    bins = masses.shape[-1]
    offsets = torch.arange(-(bins - 1), bins, device=masses.device, dtype=torch.float64)
    sigma = torch.arange(1, _SCALES + 1, device=masses.device, dtype=torch.float64)[:, None]
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum(1, keepdim=True)
    kernels = torch.zeros(_SCALES, bins, device=masses.device, dtype=torch.float64)
    kernels.index_add_(1, offsets.long().remainder(bins), weights)
    rest = 1 - torch.fft.rfft(kernels)
    rough = torch.fft.irfft(torch.fft.rfft(masses.double())[..., None, :] * rest, n=bins)
    found: torch.Tensor = (rough.norm(dim=-1) * (6 / (math.pi * sigma[:, 0]) ** 2)).sum(-1)
    return found


def divergence(target: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """KL [...] = Σ_j t_j log(t_j / (q_j + 1e-10)), in nats; target and predicted are [..., m]."""
    return (torch.xlogy(target, target) - target * torch.log(predicted + 1e-10)).sum(-1)


def expected_bin_error(target: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """The paper's squared error [...]: between centres of the bins [0, m) that the expected bins round to."""
    bins = target.shape[-1]
    places = torch.arange(bins, device=target.device, dtype=target.dtype)
    gap = (predicted * places).sum(-1).round() - (target * places).sum(-1).round()
    return (2 / bins * gap) ** 2
