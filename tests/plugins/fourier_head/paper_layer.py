"""The Fourier head as the paper writes it (arXiv 2410.22269, algorithm 1): what ours is compared with, slow on purpose.

Autocorrelation by a grouped complex convolution, then every bin as a sum over frequencies of complex exponentials,
materialised for all rows, bins and frequencies, then a division by the sum over bins.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F


def paper_autocorrelation(coefficients: torch.Tensor) -> torch.Tensor:
    """c_k [T, K] of u [T, 2K]."""
    rows, width = coefficients.shape
    count = width // 2
    amplitudes = torch.complex(*coefficients.chunk(2, -1))
    signal, filters = amplitudes[None], amplitudes.conj()[:, None]
    return F.conv1d(signal, filters, padding=count - 1, groups=rows)[0, :, count - 1 :]


def paper_density(coefficients: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """p [T, Z] at points [Z]."""
    found = paper_autocorrelation(coefficients)
    found = found / found[:, :1].real
    k = torch.arange(1, found.shape[1], dtype=points.dtype)
    waves = torch.exp(torch.complex(torch.zeros_like(k), math.pi * k) * points[:, None])
    terms = found[:, None, 1:] * waves[None].expand(len(found), -1, -1)
    return 0.5 + terms.sum(-1).real


def paper_masses(coefficients: torch.Tensor, bins: int) -> torch.Tensor:
    """P [T, bins]."""
    centres = -1 + (2 * torch.arange(bins, dtype=coefficients.dtype) + 1) / bins
    values = paper_density(coefficients, centres)
    return values / values.sum(-1, keepdim=True)


def paper_loss(coefficients: torch.Tensor, labels: torch.Tensor, bins: int) -> torch.Tensor:
    """Cross-entropy as the paper trains: a softmax of log(P + 1e-5)."""
    return F.cross_entropy(torch.log(paper_masses(coefficients, bins) + 1e-5), labels)
