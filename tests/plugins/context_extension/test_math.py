"""The closed forms against brute force, the paper's table, and the formulas of stock transformers."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.plugins.context_extension.math import (
    abf_theta,
    deviation,
    entropy_scale,
    fit_beta,
    inverse_frequencies,
    longest_wavelength,
    ntk_theta,
    paper_beta,
    step_scale,
)


@pytest.mark.parametrize(
    ("window", "length", "expected"),
    [
        (2048, 4096, 12 / 11),
        (2048, 8192, 13 / 11),
        (4096, 8192, 13 / 12),
        (4096, 16384, 14 / 12),
        (4096, 32768, 15 / 12),
    ],
)
def test_the_scale_at_powers_of_two(window: int, length: int, expected: float) -> None:
    assert entropy_scale(length - 1, window) == pytest.approx(expected, abs=1e-12)


def test_the_scale_is_one_inside_the_window_and_grows_outside() -> None:
    assert {entropy_scale(position, 4096) for position in range(4096)} == {1.0}
    assert entropy_scale(4096, 4096) == pytest.approx(1.000029, abs=1e-6)
    outside = [entropy_scale(position, 4096) for position in range(4095, 9000)]
    assert all(later > earlier for earlier, later in pairwise(outside))


@given(window=st.integers(2, 10_000), position=st.integers(0, 10**7))
def test_the_staircase_lies_on_or_above_the_scale_and_within_the_bound(window: int, position: int) -> None:
    difference = step_scale(position, window, paper_beta(window)) - entropy_scale(position, window)
    assert -1e-12 <= difference <= math.log(2) / math.log(window) + 1e-12
    if position < window:
        assert difference == 0.0


@pytest.mark.parametrize("multiple", [1, 2, 3, 7, 16])
def test_the_staircase_meets_the_scale_at_the_end_of_each_window(multiple: int) -> None:
    position = multiple * 4096 - 1
    level = step_scale(position, 4096, paper_beta(4096))
    assert level == pytest.approx(entropy_scale(position, 4096), abs=1e-14)
    assert level == pytest.approx(1 + math.log(multiple) / math.log(4096), abs=1e-14)


@pytest.mark.parametrize(
    ("factor", "beta", "largest", "mean"),
    [(2, 0.0670, 0.046, 0.021), (4, 0.0999, 0.069, 0.017), (8, 0.1118, 0.078, 0.012)],
)
def test_the_fitted_slope_and_its_deviation(factor: int, beta: float, largest: float, mean: float) -> None:
    fitted = fit_beta(4096, factor * 4096)
    assert fitted == pytest.approx(beta, abs=5e-5)
    assert deviation(4096, factor * 4096, fitted) == pytest.approx((largest, mean), abs=6e-4)


@pytest.mark.parametrize(("factor", "mean"), [(2, 0.037), (4, 0.025), (8, 0.017)])
def test_the_deviation_of_the_papers_slope(factor: int, mean: float) -> None:
    assert deviation(4096, factor * 4096, paper_beta(4096)) == pytest.approx((0.083, mean), abs=6e-4)


@given(window=st.integers(2, 60), extra=st.integers(1, 300), beta=st.floats(0.001, 2.0))
def test_figures_equal_the_sum_over_every_position(window: int, extra: int, beta: float) -> None:
    positions = range(window, window + extra)
    differences = [abs(step_scale(p, window, beta) - entropy_scale(p, window)) for p in positions]
    largest, mean = deviation(window, window + extra, beta)
    assert largest == pytest.approx(max(differences), abs=1e-9)
    assert mean == pytest.approx(sum(differences) / extra, abs=1e-9)
    heights = [math.log1p(p // window) for p in positions]
    wanted = [entropy_scale(p, window) - 1 for p in positions]
    slope = sum(h * w for h, w in zip(heights, wanted, strict=True)) / sum(h * h for h in heights)
    assert fit_beta(window, window + extra) == pytest.approx(slope, rel=1e-9)


def test_wavelengths_of_the_paper() -> None:
    assert longest_wavelength({"rope_theta": 1e4}, 128) == pytest.approx(54_410.14, abs=0.01)
    assert longest_wavelength({"rope_theta": 5e5}, 128) == pytest.approx(2_559_195.5, abs=0.1)
    for theta in (10.0, 1e4, 5e5, 1e6):
        assert inverse_frequencies({"rope_theta": theta}, 64)[0] == 1.0


def test_the_ntk_base_divides_the_slowest_frequency_and_keeps_the_fastest() -> None:
    before = inverse_frequencies({"rope_theta": 1e4}, 96)
    after = inverse_frequencies({"rope_theta": ntk_theta(1e4, 4.0, 96)}, 96)
    assert after[0] == before[0] == 1.0
    assert before[-1] / after[-1] == pytest.approx(4.0, rel=1e-12)


def test_the_automatic_base() -> None:
    assert abf_theta(1e4, 4.0, 128) == 5e5
    assert abf_theta(1e5, 64.0, 128) == 5e5
    assert abf_theta(100_001.0, 1.5, 128) == 5e5
    assert abf_theta(5e5, 4.0, 128) == ntk_theta(5e5, 4.0, 128) > 2e6


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512},
        {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 8.0, "original_max_position_embeddings": 512,
            "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
        },
        {
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 512,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_frequencies_are_those_of_stock_transformers(rope: dict) -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    length = int(512 * rope.get("factor", 1))
    config = LlamaConfig(head_dim=64, max_position_embeddings=length, rope_parameters=dict(rope))
    stock = LlamaRotaryEmbedding(config).inv_freq
    assert torch.allclose(torch.tensor(inverse_frequencies(rope, 64)), stock, rtol=2e-6, atol=0)
