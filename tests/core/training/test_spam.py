"""SPAM: Adam without spikes, clipped exactly with one, and clean after a reset."""

import math

import pytest
import torch

from regraft.core.training.spam import Spam, clip_spikes, warmup_share


def run(optimizer, parameter, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)
    return parameter.detach().clone()


def noise(steps, shape=(7, 5)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_without_spikes_and_resets_it_is_adamw(decay):
    start = torch.ones(7, 5)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": decay}
    spam = run(Spam([ours], reset_every=None, **options), ours, noise(60))
    adam = run(torch.optim.AdamW([theirs], eps=1e-6, foreach=False, **options), theirs, noise(60))
    assert (spam - start).abs().max() > 0.01
    torch.testing.assert_close(spam, adam, rtol=0, atol=1e-6)


def test_a_spike_is_clipped_to_the_bound():
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = Spam([parameter], lr=1e-3, grace_steps=2)
    run(optimizer, parameter, noise(5, (4,)))
    moments = {key: optimizer.state[parameter][key].clone() for key in ("m", "v")}
    gradient = torch.tensor([1e6, -1e6, 0.5, 0.0])
    run(optimizer, parameter, [gradient])
    bound = (5000 * moments["v"]).sqrt()
    clipped = torch.stack([bound[0], -bound[1], gradient[2], gradient[3]])
    assert torch.equal(clip_spikes(gradient, moments["v"], 5000.0), clipped)
    torch.testing.assert_close(optimizer.state[parameter]["m"], moments["m"].lerp(clipped, 0.1))


def test_grace_steps_clip_nothing():
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = Spam([parameter], grace_steps=3)
    run(optimizer, parameter, [torch.tensor([1.0, 1e-6]), torch.tensor([1.0, 1e6])])
    assert optimizer.state[parameter]["m"][1] == pytest.approx(1e5, rel=1e-3)


def test_reset_begins_anew_with_a_warm_up():
    parameter = torch.nn.Parameter(torch.zeros(3))
    optimizer = Spam([parameter], lr=1.0, reset_every=4, warmup_steps=10, eps=1e-12)
    before = run(optimizer, parameter, noise(4, (3,)))
    gradient = torch.tensor([2.0, -3.0, 0.5])
    after = run(optimizer, parameter, [gradient])
    # moments from this gradient alone: a step of one rate, with the bias correction of a first step
    torch.testing.assert_close(after - before, -gradient.sign() * warmup_share(0, 10), rtol=1e-5, atol=0)
    torch.testing.assert_close(optimizer.state[parameter]["m"], 0.1 * gradient)


def test_warm_up_values():
    assert [warmup_share(step, 150) for step in (0, 75, 149)] == pytest.approx([0.01, 0.50, 0.9996], abs=2e-4)
    assert warmup_share(150, 150) == 1
    assert warmup_share(1, 3) == pytest.approx(1 - 0.495 * (1 + math.cos(math.pi / 4)))
