"""The closed-form start from the rows that the bins had, and the others."""

import math

import pytest
import torch

from regraft.core.transformation import Run
from regraft.plugins.fourier_head import init
from regraft.plugins.fourier_head.grid import Grid
from tests.plugins.fourier_head.support import applied, base

BINS, FREQUENCIES, HIDDEN = 50, 12, 16


def rows_of(size, *, smooth, seed=0):
    """Rows of bins whose logits have this standard deviation; smooth ones are waves of up to four periods."""
    generator = torch.Generator().manual_seed(seed)
    if smooth:
        angles = math.pi * Grid(BINS).centres()[:, None] * torch.arange(1, 5)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        rows = waves @ torch.randn(8, HIDDEN, generator=generator, dtype=torch.float64)
    else:
        rows = torch.randn(BINS, HIDDEN, generator=generator, dtype=torch.float64)
    states = torch.randn(400, HIDDEN, generator=generator, dtype=torch.float64)
    return rows * (size / (states @ rows.T).std()), states


def divergence(logits, coefficients):
    wanted = logits.log_softmax(1)
    return (wanted.exp() * (wanted - Grid(BINS).log_masses(coefficients, floor=5e-4))).sum(1).mean().item()


@pytest.mark.parametrize(
    ("size", "smooth", "gain"), [(0.3, True, 30.0), (1.0, True, 8.0), (2.0, True, 3.0), (1.0, False, 1.05)]
)
def test_the_start_follows_smooth_rows(size, smooth, gain):
    rows, states = rows_of(size, smooth=smooth)
    weight, bias, explained = init.from_rows(rows, FREQUENCIES, Grid(BINS))
    ours = divergence(states @ rows.T, states @ weight.double().T + bias.double())
    uniform = divergence(states @ rows.T, torch.stack([init.uniform(FREQUENCIES, HIDDEN)[1]] * 400).double())
    assert ours < uniform / gain
    assert ours > uniform / 1000
    if smooth:
        assert explained > 0.999
    else:
        assert explained < 0.6, "rows in no order are told from ordinal ones"
        assert ours > uniform / 2


def test_a_common_part_of_all_rows_is_the_gates():
    rows, _ = rows_of(0.5, smooth=True)
    moved = init.from_rows(rows + 3 * torch.randn(HIDDEN, dtype=torch.float64), FREQUENCIES, Grid(BINS))
    for one, other in zip(moved[:2], init.from_rows(rows, FREQUENCIES, Grid(BINS))[:2], strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    same = init.from_rows(torch.ones(BINS, HIDDEN), FREQUENCIES, Grid(BINS))
    assert same[0].abs().max() < 1e-6
    flat = Grid(BINS).log_masses(same[1][None])
    assert (flat.exp() * BINS - 1).abs().max() < 1e-4


def test_the_start_holds_for_unequal_bins():
    """Bins by value, with a margin: the density lies where the values are."""
    edges = tuple((number / 20) ** 1.5 for number in range(41))
    grid = Grid(40, "exact", 0.1, edges)
    centres = grid.centres()
    rows = (0.5 * torch.sin(math.pi * centres))[:, None]
    weight, bias, explained = init.from_rows(rows, 8, grid)
    assert explained > 0.99
    masses = grid.log_masses((weight.sum(1) + bias)[None].double())[0]
    widths = grid.axis().diff()
    density = (masses.exp() / widths).log()
    slope = (density - density.mean()) - (rows[:, 0] - rows.mean())
    assert slope.abs().max() < 0.2


def test_other_starts(tmp_path):
    before = base(tmp_path / "base")
    uniform, _ = applied(before, init="uniform")
    assert (uniform.load("lm_head.fourier.weight") == 0).all()
    assert uniform.load("lm_head.fourier.bias").tolist() == [1.0] + [0.0] * 9
    random, _ = applied(before, Run("head", seed=1), init="upstream")
    bound = 1 / 8 / 100
    weight = random.load("lm_head.fourier.weight")
    assert 0.9 * bound < weight.abs().max() <= bound
    other, _ = applied(before, Run("head", seed=2), init="upstream")
    assert not torch.equal(other.load("lm_head.fourier.weight"), weight)


def test_rough_rows_are_reported(tmp_path):
    _, patch = applied(base(tmp_path / "base"))
    assert any("neighbours are hardly alike" in note for note in patch.notes)
    assert patch.metrics["rows_followed"] < 0.5
    assert patch.metrics["head_parameters_before"] == 128 * 64
    assert patch.metrics["head_parameters_after"] == 118 * 64 + 65 + 10 * 65
