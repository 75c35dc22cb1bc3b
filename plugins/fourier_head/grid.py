"""Where the bins lie on [-1, 1], and how much mass each has: at its midpoint, or by the exact integral.

    midpoint   P_j = p(z_j) / Σ_i p(z_i); equal bins over the whole period, where Σ_i p(z_i) = m/2 whatever p is
    exact      P_j = ∫ p over the bin / ∫ p over all bins, with any edges

One period of the density joins its ends: p(-1) = p(1). A `margin` keeps the bins away from there, on
[-1 + margin, 1 - margin], and bins by value have the widths of their values; both need the exact integral.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from regraft.kernels.fourier_logits import fourier_logits
from regraft.kernels.fourier_nll import fourier_nll
from regraft.plugins.fourier_head.math import normalised

Quadrature = Literal["midpoint", "exact"]


@dataclass(frozen=True)
class Grid:
    """The bins of a head.

    Args:
        bins: m.
        quadrature: how a bin's mass is taken.
        margin: kept free at both ends of [-1, 1].
        edges: m + 1 ascending values, for bins of unequal width; None for equal ones.
    """

    bins: int
    quadrature: Quadrature = "midpoint"
    margin: float = 0.0
    edges: tuple[float, ...] | None = None

    def axis(self) -> torch.Tensor:
        """The m + 1 edges on [-1, 1], fp64."""
        if self.edges is None:
            ends = torch.arange(self.bins + 1, dtype=torch.float64) * (2 / self.bins) - 1
        else:
            values = torch.tensor(self.edges, dtype=torch.float64)
            ends = 2 * (values - values[0]) / (values[-1] - values[0]) - 1
        return ends * (1 - self.margin)

    def centres(self) -> torch.Tensor:
        """The m midpoints on [-1, 1], fp64."""
        axis = self.axis()
        return (axis[1:] + axis[:-1]) / 2

    def log_masses(self, coefficients: torch.Tensor, *, floor: float = 0.0) -> torch.Tensor:
        """log((P_j + f/m) / (1 + f)) [T, m] for coefficients [T, 2K]; a floor of mass f is shared out evenly."""
        if self.quadrature == "midpoint":
            return fourier_logits(coefficients, self.bins, floor=floor)
        found = normalised(coefficients)
        axis = self.axis().to(found.device)
        masses = _integrals(found, axis[:-1], axis[1:]).clamp_min(0)
        masses = masses / masses.sum(-1, keepdim=True)
        return torch.log((masses + floor / self.bins) / (1 + floor))

    def nll(
        self, coefficients: torch.Tensor, labels: torch.Tensor, *, floor: float = 0.0, ignore_index: int = -100
    ) -> torch.Tensor:
        """-log of the mass of one bin a row, [T], 0 where ignored: O(K) a row, or O(K log K) for the exact integral."""
        if self.quadrature == "midpoint":
            return fourier_nll(
                coefficients, labels, self.bins, floor=floor, ignore_index=ignore_index, reduction="none"
            )
        counted = labels != ignore_index
        places = torch.where(counted, labels, 0)
        if bool(((places < 0) | (places >= self.bins)).any()):
            raise IndexError(f"a label is none of the {self.bins} bins")
        found, axis = normalised(coefficients), self.axis().to(labels.device)
        chosen = _integral(found, axis[places], axis[places + 1]).clamp_min(0)
        whole = _integral(found, axis[:1], axis[-1:])
        return torch.where(counted, -torch.log((chosen / whole + floor / self.bins) / (1 + floor)), 0.0)


def _integrals(found: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """∫ p from low [m] to high [m], [T, m]: one product of ĉ [T, K] with what waves integrate to.

    w/2 · (1 + 2 Re Σ ĉ_k sinc(k w/2) e^(iπ k z)) with width w and midpoint z; 1 is ĉ_0's half twice.
    """
    waves = _wave_integrals(low, high, found.shape[-1]).to(found.dtype)
    return (found @ waves.T).real


def _integral(found: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """The same for one interval a row, [T]."""
    return (found * _wave_integrals(low, high, found.shape[-1]).to(found.dtype)).sum(-1).real


def _wave_integrals(low: torch.Tensor, high: torch.Tensor, count: int) -> torch.Tensor:
    """[..., count], complex128: w/2 for k = 0, w·sinc(k w/2)·e^(iπ k z) for the others."""
    k = torch.arange(count, dtype=torch.float64, device=low.device)
    width, middle = (high - low)[..., None], (high + low)[..., None] / 2
    size = width * torch.sinc(k * width / 2) * torch.where(k == 0, 0.5, 1.0)
    angle = math.pi * k * middle
    return torch.complex(size * angle.cos(), size * angle.sin())
