"""Directions and separability in closed form."""

import math

import pytest
import torch

from regraft.plugins.steer.math import accuracy, cosine_gap, difference, entropy_weights, normalised


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_entropy_weights():
    assert entropy_weights(torch.tensor([1.0, 3.0, 0.0])).tolist() == [0.25, 0.75, 0.0]
    assert entropy_weights(torch.zeros(4)).tolist() == [0.25] * 4, "nothing to weigh by"


def test_difference_of_means():
    positive, negative = rows([1, 0], [3, 2]), rows([0, 0], [0, 2], [0, 4])
    assert difference(positive, negative).tolist() == [2.0, -1.0]
    weights = torch.tensor([0.25, 0.75])
    assert difference(positive, negative, weights).tolist() == [2.5, -0.5]
    assert difference(positive, None, weights).tolist() == [0.5, 0.5], "less the plain mean, as in EAST"
    assert difference(positive, None).tolist() == [0.0, 0.0]


def test_small_differences_of_large_activations_survive():
    """In fp32 the sum of 1000 numbers near 1e4 is off by more than this difference."""
    positive = torch.full((1000, 1), 1e4)
    positive[0] += 1.0
    assert difference(positive, torch.full((7, 1), 1e4)).item() == pytest.approx(1e-3, rel=1e-9)


def test_lengths():
    vector, activations = torch.tensor([3.0, 4.0]).double(), rows([3, 4], [0, 0], [6, 8], [0, 1])
    assert normalised(vector, activations, "none") is vector
    assert normalised(vector, activations, "unit").tolist() == pytest.approx([0.6, 0.8])
    assert normalised(vector, activations, "activation-norm").norm().item() == pytest.approx((5 + 0 + 10 + 1) / 4)
    projections = [5, 0, 10, 0.8]
    mean = sum(projections) / 4
    sigma = math.sqrt(sum((one - mean) ** 2 for one in projections) / 4)
    assert normalised(vector, activations, "deviation").tolist() == pytest.approx([0.6 * sigma, 0.8 * sigma])
    for how in ("unit", "activation-norm", "deviation"):
        assert normalised(torch.zeros(2).double(), activations, how).tolist() == [0.0, 0.0]


def test_accuracy_leaves_each_prompt_out():
    positive, negative = rows([1, 0], [2, 0], [3, 0]), rows([-1, 0], [-2, 0])
    assert accuracy(positive, negative) == 1.0
    assert accuracy(positive, positive.clone()) == pytest.approx(1 / 6), "with its own point in the mean each is a draw"
    assert accuracy(torch.zeros(3, 2), torch.zeros(2, 2)) == 0.5, "draws"
    assert accuracy(positive[:1], negative) is None


def test_accuracy_against_a_loop():
    draw = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(9, 4, generator=draw) + 0.4, torch.randn(7, 4, generator=draw)
    right = 0
    for own, other in ((positive, negative), (negative, positive)):
        for index in range(len(own)):
            rest = torch.cat([own[:index], own[index + 1 :]]).mean(0)
            right += bool((own[index] - rest).norm() < (own[index] - other.mean(0)).norm())
    assert accuracy(positive, negative) == pytest.approx(right / 16)
    assert 0.5 < right / 16 < 1


def test_noise_is_not_told_apart_however_many_dimensions():
    """The plane through means that hold the point itself would put every one of these right."""
    draw = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(20, 2000, generator=draw), torch.randn(20, 2000, generator=draw)
    direction = positive.mean(0) - negative.mean(0)
    middle = (positive.mean(0) + negative.mean(0)) / 2
    assert bool((((positive - middle) @ direction) > 0).all())
    assert accuracy(positive, negative) < 0.7


def test_cosine_gap():
    vector = rows([2, 0])[0]
    assert cosine_gap(rows([1, 0], [3, 0]), rows([-1, 0], [-3, 0]), vector) == pytest.approx(1.0)
    assert cosine_gap(rows([1, 1], [1, -1]), rows([-1, 1], [-1, -1]), vector) == pytest.approx(math.sqrt(0.5))
    assert cosine_gap(rows([0, 1], [0, -1]), rows([0, 1], [0, -1]), vector) == pytest.approx(0.0)
