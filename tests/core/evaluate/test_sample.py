"""Figures and intervals: what the formulas say, and paired draws."""

import math
from random import Random

import pytest

from regraft.core.evaluate.sample import Sample, compare


def values(count, seed=1):
    random = Random(seed)
    return {f"u{number}": random.gauss(3.0, 2.0) for number in range(count)}


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    found = compare(Sample.mean(values(400))).model
    own = list(values(400).values())
    mean = math.fsum(own) / 400
    error = math.sqrt(math.fsum((one - mean) ** 2 for one in own)) / 400
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_a_ratio_weighs_its_units_and_a_perplexity_is_e_to_it():
    sample = Sample([2.0, 6.0, 1.0], [1.0, 2.0, 1.0], ["a", "b", "c"])
    assert sample.value == 9 / 4
    assert Sample(sample.totals, sample.weights, sample.keys, "exp").value == pytest.approx(math.exp(9 / 4))
    assert math.isnan(Sample([0.0], [0.0], ["a"]).value)
    assert Sample([1e6], [1.0], ["a"], "exp").value == math.inf


def test_draws_are_paired_by_key_and_not_by_order():
    own = values(50)
    shifted = {key: own[key] + 0.25 for key in reversed(own)}
    change = compare(Sample.mean(shifted), Sample.mean(own)).difference
    assert (change.value, change.low, change.high) == pytest.approx((0.25, 0.25, 0.25))
    apart = compare(Sample.mean(shifted), Sample.mean({f"x{key}": value for key, value in own.items()})).difference
    assert apart.high - apart.low > 1


def test_the_seed_decides_and_one_unit_has_no_interval():
    sample = Sample.mean(values(30))
    assert compare(sample, seed=1) == compare(sample, seed=1)
    assert compare(sample, seed=1) != compare(sample, seed=2)
    assert compare(sample, seed=1, draws=5000).model.low == pytest.approx(compare(sample, seed=1).model.low, abs=0.1)
    alone = compare(Sample.mean({"a": 2.0})).model
    assert (alone.value, alone.low, alone.high) == (2.0, None, None)
    assert math.isnan(compare(Sample.mean({}), Sample.mean({})).difference.value)
