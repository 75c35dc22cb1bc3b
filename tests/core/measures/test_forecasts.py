"""Scores of forecasts against closed forms, integrals, sums over pairs, and forecasts that know the truth."""

import math

import numpy
import pytest

from regraft.core.measures import forecasts as measure

RANDOM = numpy.random.default_rng(3)


def test_crps_of_a_sure_forecast_is_the_absolute_error():
    actual = numpy.array([1.0, -2.0, 5.0])
    for count in (1, 2, 7):
        paths = numpy.tile([1.5, 0.0, 5.0], (count, 1))
        assert measure.crps(paths, actual) == pytest.approx([0.5, 2.0, 0.0])


def test_crps_is_the_sum_over_pairs():
    paths, actual = RANDOM.normal(size=(9, 4)), RANDOM.normal(size=4)
    pairs = [abs(one - other) for number, one in enumerate(paths) for other in paths[:number]]
    expected = abs(paths - actual).mean(0) - numpy.mean(pairs, axis=0) / 2
    assert measure.crps(paths, actual) == pytest.approx(expected)


def test_crps_of_normal_draws_is_the_closed_form_and_that_the_integral():
    mean, deviation, actual = numpy.array([0.0, 1.0, -3.0]), numpy.array([1.0, 2.0, 0.5]), numpy.array([0.7, 1.0, 2.0])
    closed = measure.gaussian_crps(mean, deviation, actual)
    drawn = measure.crps(RANDOM.normal(mean, deviation, size=(40_000, 3)), actual)
    assert drawn == pytest.approx(closed, rel=0.02)
    points = numpy.linspace(-30, 30, 60_001)
    for number in range(3):
        below = [0.5 * (1 + math.erf((x - mean[number]) / deviation[number] / math.sqrt(2))) for x in points]
        gaps = (numpy.array(below) - (points >= actual[number])) ** 2
        assert gaps.sum() * (points[1] - points[0]) == pytest.approx(closed[number], rel=1e-3)
    assert measure.gaussian_crps(mean, 0 * mean, actual) == pytest.approx(abs(mean - actual))


def test_crps_does_not_depend_on_the_number_of_paths():
    """In the mean: the score with pairs of a path with itself would be 1.25 times as large with four paths."""
    actual = RANDOM.normal(size=20_000)
    few, many = (measure.crps(RANDOM.normal(size=(count, 20_000)), actual).mean() for count in (4, 40))
    assert few == pytest.approx(many, rel=0.02)
    assert many == pytest.approx(1 / math.sqrt(math.pi), rel=0.02)


def test_quantile_loss_over_many_levels_is_the_crps():
    paths, actual = RANDOM.normal(size=(4000, 3)), numpy.array([0.0, 1.0, -2.5])
    levels = [(number + 0.5) / 400 for number in range(400)]
    loss = measure.quantile_loss(measure.quantiles(paths, levels), levels, actual)
    assert loss == pytest.approx(measure.crps(paths, actual), rel=0.01)
    exact = measure.quantile_loss(numpy.array([[1.0], [3.0]]), [0.1, 0.9], numpy.array([2.0]))
    assert exact == pytest.approx([2 * (0.1 * 1 + 0.1 * 1) / 2])


@pytest.mark.parametrize("count", [20, 100])
def test_intervals_of_the_true_distribution_cover_what_they_say(count):
    paths, actual = RANDOM.normal(size=(count, 20_000)), RANDOM.normal(size=20_000)
    for level in (0.5, 0.8):
        assert measure.covered(paths, actual, level).mean() == pytest.approx(level, abs=0.015)
    sure = numpy.ones((count, 2))
    assert measure.covered(sure, numpy.array([1.0, 1.5]), 0.95).tolist() == [1, 0]


@pytest.mark.parametrize("period", [1, 4])
def test_the_seasonal_naive_forecast_has_a_mase_of_one_in_the_sample(period):
    """One season ahead, from every value on: by definition."""
    values = RANDOM.normal(size=60).cumsum()
    errors = [
        abs(measure.seasonal_naive(values[:stop], period, period)[0] - values[stop]) for stop in range(period, 60)
    ]
    assert numpy.mean(errors) / measure.naive_error(values, period) == pytest.approx(1)


def test_the_seasonal_naive_forecast_repeats_the_last_season():
    history = numpy.array([9.0, 1.0, 2.0, 3.0])
    assert measure.seasonal_naive(history, 7, 3).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert measure.naive_error(history, 3) == 6
    assert measure.naive_deviation(history, 7, 3) == pytest.approx(6 * numpy.sqrt([1, 1, 1, 2, 2, 2, 3]))
