"""Closed forms of the learning rate."""

import math

import pytest

from regraft.core.training.schedules import rate_share


def shares(steps, **options):
    return [rate_share(step, steps, **options) for step in range(steps)]


def test_constant_with_warmup():
    assert shares(5, schedule="constant", warmup_steps=2) == [0.5, 1, 1, 1, 1]


def test_linear_to_zero_as_the_reference_trainer():
    assert shares(4, schedule="linear") == [1, 0.75, 0.5, 0.25]
    assert shares(6, schedule="linear", warmup_steps=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]


def test_cosine():
    expected = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert shares(6, schedule="cosine") == pytest.approx(expected)
    assert shares(6, schedule="cosine")[3] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_final_rate(schedule):
    values = shares(1000, schedule=schedule, final=0.1)
    assert values[0] == 1
    assert values[-1] == pytest.approx(0.1, abs=2e-3)
    assert values == sorted(values, reverse=True)


def test_warmup_as_long_as_the_training():
    assert shares(2, schedule="cosine", warmup_steps=2) == [0.5, 1]
