"""Closed forms in float64, against the paper's formulas, quadrature and known densities."""

import math

import pytest
import torch

from regraft.kernels.fourier_logits import fourier_logits
from regraft.kernels.fourier_nll import fourier_nll
from regraft.plugins.fourier_head import math as fm
from regraft.plugins.fourier_head.grid import Grid
from regraft.plugins.fourier_head.metrics import divergence, expected_bin_error, smoothness
from tests.plugins.fourier_head.paper_layer import (
    paper_autocorrelation,
    paper_density,
    paper_loss,
    paper_masses,
)

FINE = torch.arange(20000, dtype=torch.float64) / 10000 - 1
"""A period, end left out: the trapezoid rule is exact for trigonometric sums."""


def coefficients(rows=6, count=13, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2 * count, generator=generator, dtype=torch.float64).to(dtype)


def paired(real, imaginary=None):
    real = torch.tensor([real], dtype=torch.float64)
    return torch.cat([real, torch.zeros_like(real) if imaginary is None else torch.tensor([imaginary])], 1)


def test_it_is_the_density_of_the_paper():
    u = coefficients()
    centres = Grid(50).centres()
    assert (fm.autocorrelation(u) - paper_autocorrelation(u)).abs().max() < 1e-13
    assert (fm.density(u, centres) - paper_density(u, centres)).abs().max() < 1e-13
    assert (Grid(50).log_masses(u).exp() - paper_masses(u, 50)).abs().max() < 1e-14
    single = u.float()
    assert (Grid(50).log_masses(single).exp() - paper_masses(u, 50)).abs().max() < 1e-5 * paper_masses(u, 50).max()
    labels = torch.tensor([0, 7, 49, 3, 20, 20])
    assert abs(fourier_nll(u, labels, 50, floor=50e-5) - paper_loss(u, labels, 50)) < 1e-13


def test_it_is_a_density():
    u = coefficients()
    values = fm.density(u, FINE)
    assert (values.mean(1) * 2 - 1).abs().max() < 1e-12
    for row, column in ((0, 17), (5, 10001)):
        assert abs(fm.density_at(u, FINE[[column] * 6])[row] - values[row, column]) < 1e-13
    u.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fm.density_at(x, FINE[:6]), u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_never_negative(dtype):
    """A hundred thousand densities; the paper's form goes below zero in fp32 (-1.9e-6 at 128 frequencies)."""
    u = coefficients(100_000, 9, dtype, seed=4)
    logits = fourier_logits(u, 20)
    assert not logits.isnan().any()
    assert (logits.exp() >= 0).all()
    assert (logits.exp().sum(1) - 1).abs().max() < 1e-5


def test_bins_sum_to_one_only_with_fewer_frequencies():
    u = coefficients(8, 50)
    assert (fm.density(u, Grid(50).centres()).sum(1) / 25 - 1).abs().max() < 1e-13
    more = coefficients(8, 51)
    assert (fm.density(more, Grid(50).centres()).sum(1) / 25 - 1).abs().max() > 0.02


def test_midpoint_and_exact_masses():
    u = coefficients()
    exact = Grid(50, "exact").log_masses(u).exp()
    axis = Grid(50).axis()
    steps = torch.stack([fm.cdf(u, axis[[j] * 6]) for j in range(51)], 1).diff(dim=1)
    assert (exact - steps).abs().max() < 1e-14
    assert (exact.sum(1) - 1).abs().max() < 1e-13
    gap = (exact - Grid(50).log_masses(u).exp()).abs().max()
    assert 1e-4 < gap < 2e-2, "the two quadratures differ, a little"
    fine = fm.density(u, FINE).view(6, 50, 400)  # each bin by the rectangle rule
    assert (exact - fine.mean(2) / 25).abs().max() < 5e-4


@pytest.mark.parametrize(
    "grid",
    [Grid(40, "exact"), Grid(40, "exact", margin=0.2), Grid(4, "exact", edges=(0.0, 1.0, 4.0, 4.5, 10.0), margin=0.05)],
)
def test_general_bins(grid):
    """Margins and unequal bins: masses are what the density puts there; one bin's loss is that of the dense form."""
    u = coefficients(6, 4).requires_grad_()
    axis = grid.axis()
    assert axis[0].item() == -axis[-1].item() == pytest.approx(grid.margin - 1)
    masses = grid.log_masses(u).exp()
    steps = torch.stack([fm.cdf(u, axis[[j] * 6]) for j in range(grid.bins + 1)], 1).diff(dim=1)
    assert (masses - steps / steps.sum(1, keepdim=True)).abs().max() < 1e-13
    labels = torch.tensor([0, 3, -100, 1, 2, 3])
    loss = grid.nll(u, labels, floor=1e-3)
    dense = -grid.log_masses(u, floor=1e-3)[torch.arange(6), labels.clamp_min(0)] * (labels >= 0)
    assert (loss - dense).abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda x: grid.nll(x, labels, floor=1e-3), u)
    assert (grid.log_masses(u, floor=0.1).exp().sum(1) - 1).abs().max() < 1e-12
    with pytest.raises(IndexError, match="none of the"):
        grid.nll(u, labels + 1)


def test_values_set_the_widths():
    grid = Grid(3, "exact", edges=(-1.0, 0.0, 1.0, 7.0))
    uniform = grid.log_masses(paired([1.0, 0.0])).exp()
    assert torch.allclose(uniform, torch.tensor([[1, 1, 6]]).double() / 8, atol=1e-14)


def test_known_densities():
    z = torch.tensor([-0.3, 0.0, 0.8], dtype=torch.float64)
    assert (fm.density(paired([1.0, 0, 0, 0]), z) - 0.5).abs().max() == 0
    fejer = paired([1.0] * 9)
    assert fm.density(fejer, z)[0, 1].item() == pytest.approx(9 / 2, abs=1e-13)
    sines = (torch.sin(9 * math.pi * z / 2) / torch.sin(math.pi * z / 2)) ** 2 / 18
    assert torch.allclose(fm.density(fejer, z)[0, [0, 2]], sines[[0, 2]], atol=1e-13)
    assert (fm.density(torch.zeros(2, 8), z.float()) == 0.5).all()


def test_shift_and_scale():
    u, z, shift = coefficients(), torch.linspace(-1, 1, 31, dtype=torch.float64), 0.37
    turn = torch.exp(-1j * math.pi * shift * torch.arange(13, dtype=torch.float64))
    turned = fm.complex_coefficients(u) * turn
    moved = torch.cat([turned.real, turned.imag], 1)
    assert (fm.density(moved, z) - fm.density(u, z - shift)).abs().max() < 1e-12
    assert (fm.density(-3 * u, z) - fm.density(u, z)).abs().max() < 1e-13
    u.requires_grad_()
    loss = fourier_nll(u, torch.arange(6), 50)
    radial = (torch.autograd.grad(loss, u)[0] * u).sum(1)
    assert radial.abs().max() < 1e-14


def test_cdf_mean_and_quantiles():
    u = coefficients()
    ends = torch.ones(6, dtype=torch.float64)
    assert (fm.cdf(u, ends) - 1).abs().max() < 1e-13
    assert fm.cdf(u, -ends).abs().max() < 1e-13
    grid = torch.linspace(-1, 1, 301, dtype=torch.float64)
    assert (torch.stack([fm.cdf(u, grid[[j] * 6]) for j in range(301)], 1).diff(dim=1) >= 0).all()
    middles = FINE + 0.5e-4
    assert (fm.mean(u) - (fm.density(u, middles) * middles).mean(1) * 2).abs().max() < 1e-7
    levels = torch.tensor([0.01, 0.2, 0.5, 0.7, 0.9, 0.999], dtype=torch.float64)
    assert (fm.cdf(u, fm.quantile(u, levels, steps=45)) - levels).abs().max() < 1e-12
    assert (fm.quantile(u, levels) - fm.quantile(u, levels, steps=45)).abs().max() < 2**-24


def test_samples_follow_the_density():
    u = coefficients(1, 5, torch.float32).expand(40_000, -1)
    drawn = fm.sample(u, generator=torch.Generator().manual_seed(0))
    counts = torch.histc(drawn, 10, -1, 1) / len(drawn)
    assert (counts - Grid(10, "exact").log_masses(u[:1]).exp()[0]).abs().max() < 0.01


def test_penalties():
    u = coefficients()
    k = torch.arange(13, dtype=torch.float64)
    expected = 2 * (2 * math.pi**2 * k**2 * paper_autocorrelation(u).abs() ** 2).sum(1).mean()
    assert abs(fm.upstream_penalty(u) / expected - 1) < 1e-13
    step = 1e-4
    slope = (fm.density(u, FINE + step) - fm.density(u, FINE - step)) / (2 * step)
    assert abs(fm.normalised_penalty(u) / ((slope**2).mean(1) * 2).mean() - 1) < 1e-4
    assert abs(fm.normalised_penalty(7 * u) - fm.normalised_penalty(u)) < 1e-9
    assert fm.upstream_penalty(2 * u) / fm.upstream_penalty(u) == pytest.approx(16)


def test_smoothness_has_the_constants_of_the_papers_code():
    """Measured with scipy's gaussian_filter1d in wrap mode, radius m - 1."""
    eye = torch.eye(50, dtype=torch.float64)
    assert smoothness(torch.full((50,), 0.02)).item() < 1e-9
    assert smoothness(eye).sub(0.775612).abs().max() < 5e-7
    centres = Grid(50).centres()
    gaussian = torch.exp(-(centres**2) / 0.02)
    assert smoothness(gaussian / gaussian.sum()).item() == pytest.approx(0.068026, abs=5e-7)


def test_divergence_and_error():
    target = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    predicted = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]], dtype=torch.float64)
    found = divergence(target, predicted)
    assert found[0].item() == pytest.approx(math.log(2), abs=1e-9)
    assert found[1].item() == pytest.approx(10 * math.log(10), abs=1e-9)
    assert expected_bin_error(target, predicted)[1].item() == pytest.approx((2 / 3 * 2) ** 2)


def test_continuous_targets():
    u = coefficients().requires_grad_()
    targets = torch.tensor([-1.0, 1.0, 0.0, 0.3, -0.2, 0.9], dtype=torch.float64)
    assert (fm.continuous_nll(u, targets) + torch.log(fm.density_at(u, targets) + 1e-10)).abs().max() < 1e-15
    assert torch.autograd.gradcheck(lambda x: fm.continuous_nll(x, targets), u)
    for wrong in (float("nan"), 1.0001):
        with pytest.raises(ValueError, match="targets are numbers from -1 to 1"):
            fm.continuous_nll(u, torch.tensor([0.0, 0, 0, wrong, 0, 0]))
