"""The numbers of context extension, in plain floats: nothing here needs torch.

d is the number of rotary dimensions of a head, b the base (`rope_theta`), c the window the model was trained on, s the
extension factor, p a position counted from 0. Frequencies follow Su et al. (2104.09864), interpolation Chen et al.
(2306.15595), YaRN Peng et al. (2309.00071), the entropy-aware scale Zhang et al. (2401.07004).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

ABF_THETA = 500_000.0
"""The base of 2401.07004, Table 1, and of its released code (the prose says 50 000 twice)."""

ABF_SOURCE_THETA = 100_000.0
"""Up to this base the paper's constant is taken as it is; above it the paper gives no rule."""


def ntk_theta(theta: float, factor: float, dim: int) -> float:
    """b · s^(d / (d - 2)): the base under which the slowest of the d / 2 frequencies is divided by exactly s."""
    return float(theta * factor ** (dim / (dim - 2)))


def abf_theta(theta: float, factor: float, dim: int) -> float:
    """The base that `rope_theta = "auto"` stands for."""
    return ABF_THETA if theta <= ABF_SOURCE_THETA else max(ABF_THETA, ntk_theta(theta, factor, dim))


def inverse_frequencies(rope: Mapping[str, Any], dim: int) -> list[float]:
    """Radians per position of the d / 2 rotary pairs, fastest first.

    Args:
        rope: `rope_parameters` of type default, linear, yarn or llama3.
        dim: d.
    """
    plain = [rope["rope_theta"] ** (-2 * j / dim) for j in range(dim // 2)]
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return plain
    factor = rope["factor"]
    if kind == "linear":
        return [frequency / factor for frequency in plain]
    kept = _yarn_kept(rope, dim) if kind == "yarn" else [_llama3_kept(rope, frequency) for frequency in plain]
    return [frequency * (share + (1 - share) / factor) for frequency, share in zip(plain, kept, strict=True)]


def longest_wavelength(rope: Mapping[str, Any], dim: int) -> float:
    """Positions in one turn of the slowest rotary pair."""
    return 2 * math.pi / inverse_frequencies(rope, dim)[-1]


def _yarn_kept(rope: Mapping[str, Any], dim: int) -> list[float]:
    """How much of each pair's frequency YaRN keeps: 1 fast, 0 slow, a ramp between (2309.00071, section 3.2)."""

    def pair(rotations: float) -> float:
        turns = rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope["rope_theta"]))

    low, high = pair(rope.get("beta_fast") or 32), pair(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    return [1 - min(max((j - low) / width, 0), 1) for j in range(dim // 2)]


def _llama3_kept(rope: Mapping[str, Any], frequency: float) -> float:
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    return float(min(max((turns - low) / (high - low), 0), 1))


def entropy_scale(position: int, window: int) -> float:
    """t(p) = max(1, ln(p + 1) / ln c): the factor on the logits of the query at p."""
    return max(1.0, math.log(position + 1) / math.log(window))


def step_scale(position: int, window: int, beta: float) -> float:
    """1 + beta · ln(1 + floor(p / c)): the factor that Ministral3 applies."""
    return 1 + beta * math.log1p(position // window)


def paper_beta(window: int) -> float:
    """1 / ln c: with it the staircase meets t at p = m·c - 1 and lies above it elsewhere, by at most ln 2 / ln c."""
    return 1 / math.log(window)


def fit_beta(window: int, length: int) -> float:
    """The slope of least squared deviation from t over positions c to length - 1.

    Raises:
        ValueError: there are no such positions.
    """
    if length <= window:
        raise ValueError(f"no positions between {window} and {length}")
    products = squares = 0.0
    for start, stop in _steps(window, length):
        height = math.log1p(start // window)
        products += height * (_sum_log(start, stop) / math.log(window) - (stop - start))
        squares += height * height * (stop - start)
    return products / squares


def deviation(window: int, length: int, beta: float) -> tuple[float, float]:
    """Largest and mean absolute difference of the staircase from t over positions c to length - 1, all of them."""
    largest = total = 0.0
    for start, stop in _steps(window, length):
        level = step_scale(start, window, beta)
        ends = (level - entropy_scale(start, window), level - entropy_scale(stop - 1, window))
        largest = max(largest, *map(abs, ends))
        crossing = min(max(math.floor(window**level), start), stop)
        for first, last, sign in ((start, crossing, 1), (crossing, stop, -1)):
            total += sign * (level * (last - first) - _sum_log(first, last) / math.log(window))
    return largest, total / (length - window)


def _steps(window: int, length: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions from c to length - 1 on which the staircase is level."""
    for start in range(window, length, window):
        yield start, min(start + window, length)


def _sum_log(start: int, stop: int) -> float:
    """Sum of ln(p + 1) over positions start to stop - 1."""
    return math.lgamma(stop + 1) - math.lgamma(start + 1)
