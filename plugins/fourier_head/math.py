"""Densities on [-1, 1] as squared amplitudes of Fourier sums: Gillman et al. (arXiv 2410.22269), in another form.

    A(z) = Σ_l a_l e^(iπ l z),  l = 0 .. N     p(z) = |A(z)|² / (2 c₀) = 1/2 + Re Σ_k ĉ_k e^(iπ k z)
    c_k = Σ_l conj(a_l) a_(l+k)                ĉ_k = c_k / c₀

The paper writes the second form, with the autocorrelation c_k; the first is the same density, never negative in any
precision. Shapes: T rows, K = N + 1; coefficients u [..., 2K] hold the real parts of a and then the imaginary ones.
Sums are fp32, or fp64 for fp64 coefficients. Coefficients of zero stand for the uniform density.
"""

from __future__ import annotations

import math

import torch

from regraft.kernels.fourier_nll import TINY


def complex_coefficients(coefficients: torch.Tensor) -> torch.Tensor:
    """a [..., K], complex, of u [..., 2K]."""
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    return torch.complex(*(part.contiguous() for part in coefficients.to(wide).chunk(2, -1)))


def autocorrelation(coefficients: torch.Tensor) -> torch.Tensor:
    """c_k [..., K], complex, k = 0 .. N: by one FFT of twice the length, O(N log N) a row."""
    amplitudes = complex_coefficients(coefficients)
    count = amplitudes.shape[-1]
    spectrum = torch.fft.fft(amplitudes, n=2 * count)
    squared = spectrum.real.square() + spectrum.imag.square()
    found: torch.Tensor = torch.fft.ifft(squared, n=2 * count)
    return found[..., :count]


def normalised(coefficients: torch.Tensor) -> torch.Tensor:
    """ĉ_k [..., K], complex; 1, 0, 0, ... for the uniform density."""
    found = autocorrelation(coefficients)
    energy = found[..., :1].real
    uniform = torch.zeros_like(found)
    uniform[..., 0] = 1
    return torch.where(energy > TINY, found / energy.clamp_min(TINY), uniform)


def density(coefficients: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """p [..., Z] at points z [Z] that all rows share."""
    real, imaginary = _parts(coefficients)
    cos, sin = _waves(points, real.shape[-1], real.dtype)
    squares = (real @ cos.T - imaginary @ sin.T).square() + (real @ sin.T + imaginary @ cos.T).square()
    return _over_energy(squares, real, imaginary)


def density_at(coefficients: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """p [...] at one point z [...] a row: the continuous variant's likelihood, O(N) a row."""
    real, imaginary = _parts(coefficients)
    cos, sin = _waves(points, real.shape[-1], real.dtype)
    along = (real * cos - imaginary * sin).sum(-1), (real * sin + imaginary * cos).sum(-1)
    return _over_energy((along[0].square() + along[1].square())[..., None], real, imaginary)[..., 0]


def continuous_nll(coefficients: torch.Tensor, points: torch.Tensor, *, offset: float = 1e-10) -> torch.Tensor:
    """-log(p(z) + offset) [...], the loss of continuous targets z [...] in [-1, 1]; the paper's code adds 1e-10.

    Raises:
        ValueError: a target is not a number of [-1, 1].
    """
    inside = (points >= -1) & (points <= 1)  # NaN is not
    if not bool(inside.all()):
        place = int((~inside).flatten().nonzero()[0])
        raise ValueError(f"targets are numbers from -1 to 1, not {points.flatten()[place].item()} (number {place})")
    return -torch.log(density_at(coefficients, points) + offset)


def cdf(coefficients: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """F(z) = ∫_-1^z p, [...], at one point a row.

    F(z) = (z + 1)/2 + Re Σ_k ĉ_k (e^(iπ k z) - (-1)^k) / (iπ k).
    """
    return _cdf(normalised(coefficients), points)


def quantile(coefficients: torch.Tensor, levels: torch.Tensor, *, steps: int = 25) -> torch.Tensor:
    """z [...] with F(z) = level [...], by bisection; `steps` halvings of [-1, 1]."""
    found = normalised(coefficients)
    low = torch.full_like(levels, -1.0, dtype=found.real.dtype)
    high = -low
    for _ in range(steps):
        middle = (low + high) / 2
        below = _cdf(found, middle) < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def mean(coefficients: torch.Tensor) -> torch.Tensor:
    """E[z] [...] = Σ_k 2 (-1)^k / (π k) · Im ĉ_k."""
    found = normalised(coefficients)[..., 1:]
    k = torch.arange(1, found.shape[-1] + 1, device=found.device, dtype=found.real.dtype)
    return (found.imag * (2 / math.pi) * (1 - 2 * (k % 2)) / k).sum(-1)


def sample(coefficients: torch.Tensor, *, generator: torch.Generator | None = None, steps: int = 25) -> torch.Tensor:
    """One draw of z [...] for each row."""
    real, _ = _parts(coefficients)
    levels = torch.rand(real.shape[:-1], generator=generator, dtype=real.dtype, device=real.device)
    return quantile(coefficients, levels, steps=steps)


def upstream_penalty(coefficients: torch.Tensor) -> torch.Tensor:
    """4π² · mean over rows of Σ k² |c_k|²: the regulariser of the paper's code, before its factor.

    It scales as the fourth power of the coefficients, which the density ignores: shrinking them satisfies it.
    """
    return 4 * math.pi**2 * _roughness(autocorrelation(coefficients)).mean()


def normalised_penalty(coefficients: torch.Tensor) -> torch.Tensor:
    """Mean over rows of ∫ p'² dz = π² Σ k² |ĉ_k|²: the same for all multiples of the coefficients."""
    return math.pi**2 * _roughness(normalised(coefficients)).mean()


def _roughness(found: torch.Tensor) -> torch.Tensor:
    k = torch.arange(found.shape[-1], device=found.device, dtype=found.real.dtype)
    return (k.square() * (found.real.square() + found.imag.square())).sum(-1)


def _parts(coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(coefficients.dtype, torch.float32)
    real, imaginary = coefficients.to(wide).chunk(2, -1)
    return real, imaginary


def _waves(points: torch.Tensor, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., count] of π l z; angles in fp64, since at frequency 550 those of fp32 are off by 1e-4."""
    frequencies = torch.arange(count, device=points.device, dtype=torch.float64)
    angles = math.pi * points.double()[..., None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _over_energy(squares: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
    energy = (real.square() + imaginary.square()).sum(-1, keepdim=True)
    return torch.where(energy > TINY, squares / (2 * energy.clamp_min(TINY)), 0.5)


def _cdf(found: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    cos, sin = _waves(points, found.shape[-1], found.real.dtype)
    k = torch.arange(1, found.shape[-1], device=found.device, dtype=found.real.dtype)
    parity = 1 - 2 * (k % 2)
    real, imaginary = found.real[..., 1:], found.imag[..., 1:]
    waves = real * sin[..., 1:] + imaginary * (cos[..., 1:] - parity)
    return (points + 1) / 2 + (waves / (math.pi * k)).sum(-1)
