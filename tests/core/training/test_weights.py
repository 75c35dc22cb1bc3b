"""What learns: copies, slices, averages."""

import pytest
import torch

from regraft.core.errors import Unsupported, UsageError
from regraft.core.training.weights import Average, Trainable, Weights, digest, select


def parameter(*shape, dtype=torch.float32):
    return torch.nn.Parameter(torch.arange(1, 1 + torch.Size(shape).numel()).reshape(shape).to(dtype) / 7)


def test_a_whole_fp32_parameter_is_its_own_leaf():
    one = parameter(3, 2)
    weights = Weights({"w": Trainable(one)})
    assert weights.leaves["w"] is one
    assert one.requires_grad
    weights.clear()
    assert not one.requires_grad


def test_a_slice_has_its_own_leaf_and_leaves_the_rest():
    one = parameter(4, 3)
    before = one.detach().clone()
    weights = Weights({"w": Trainable(one, (2, 0), 1)})
    assert weights.leaves["w"].shape == (4, 2)
    (one.square().sum()).backward()
    weights.collect()
    assert torch.equal(weights.leaves["w"].grad, 2 * before[:, [2, 0]])
    assert one.grad is None
    weights.leaves["w"].zero_()
    weights.write_back()
    assert torch.equal(one[:, 1], before[:, 1])
    assert not one[:, [0, 2]].any()


def test_gradients_of_low_precision_are_summed_in_fp32():
    one = parameter(2, dtype=torch.bfloat16)
    weights = Weights({"w": Trainable(one)})
    for value in (256.0, 1.0):
        one.grad = torch.full((2,), value, dtype=torch.bfloat16)
        weights.collect()
    assert weights.leaves["w"].grad.tolist() == [257.0, 257.0], "257 is no bfloat16"
    assert Weights({"w": Trainable(one)}, masters=False).leaves["w"] is one


def test_average_closed_form():
    one = parameter(5)
    weights = Weights({"w": Trainable(one)})
    average, start = Average(weights, 0.9), one.detach().clone()
    with torch.no_grad():
        one.fill_(3.0)
    for _ in range(7):
        average.update(weights)
    torch.testing.assert_close(average.values["w"], 3.0 + 0.9**7 * (start - 3.0))


def test_digest_sees_values_and_names():
    one = parameter(3)
    first = digest({"w": Trainable(one)})
    assert first == digest({"w": Trainable(parameter(3))})
    assert first != digest({"v": Trainable(one)})
    one.data[0] = -1
    assert first != digest({"w": Trainable(one)})


def test_what_cannot_learn():
    with pytest.raises(Unsupported, match="cannot learn"):
        Weights({"w": Trainable(torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False))})
    with pytest.raises(UsageError, match="no such parameter"):
        select(torch.nn.Linear(2, 2), ["weights"])
    assert list(select(torch.nn.Linear(2, 2))) == ["weight", "bias"]
