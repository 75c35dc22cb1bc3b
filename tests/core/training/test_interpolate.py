"""Interpolation of weights: exact at both ends, and where nothing was learnt."""

import pytest
import torch

from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.interpolate import interpolate
from regraft.core.training.trained import trained_patch
from tests.core.training.support import model_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).tolist()


def pair(dtype, after=torch.float32):
    draw = torch.Generator().manual_seed(3)
    before = torch.randn(7, 5, generator=draw).to(dtype)
    return before, before.to(after) + torch.randn(7, 5, generator=draw).to(after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_both_ends_are_exact(dtype):
    before, after = pair(dtype)
    before[0, 0], before[0, 1] = -0.0, torch.inf
    assert bits(interpolate(before, after, 0.0)) == bits(before)
    assert bits(interpolate(before, after, 1.0)) == bits(after.to(dtype))
    assert bits(interpolate(before, after, 0.5)) not in (bits(before), bits(after.to(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strength", [0.25, 0.5, 1.75, -1.0])
def test_between_and_beyond(dtype, strength):
    before, after = pair(dtype)
    exact = before.double() + strength * (after.double() - before.double())
    result = interpolate(before, after, strength)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6)


def test_it_is_rounded_once():
    """Rounded to bfloat16 first, a change of 2.6 units would be 3, and half of that, being even, 2."""
    unit = 2.0**-7
    before, after = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1 + 2.6 * unit])
    assert interpolate(before, after, 0.5).item() == 1 + unit
    assert interpolate(before, after.bfloat16(), 0.5).item() == 1 + 2 * unit


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_what_was_not_learnt_keeps_its_bytes(strength):
    before = torch.tensor([-0.0, 0.1, torch.inf, 3e-45, 65504.0, -7.5])
    after = before.clone()
    after[5] = 2.0
    assert bits(interpolate(before, after, strength)[:5]) == bits(before[:5])


def test_the_result_is_a_copy_of_its_own():
    before, after = pair(torch.float32)
    for strength in (0.0, 0.5, 1.0):
        result = interpolate(before.T, torch.nn.Parameter(after).T, strength)
        assert result.is_contiguous()
        assert not result.requires_grad
        kept = (before.clone(), after.clone())
        result.zero_()
        assert torch.equal(before, kept[0])
        assert torch.equal(after, kept[1])


def test_a_patch_stores_a_share_of_what_was_learnt(tiny_folder):
    folder = tiny_folder("llama", dtype=torch.bfloat16, tokenizer=False)
    base, model, name = open_checkpoint(folder), model_of(folder), "model.layers.0.mlp.up_proj.weight"
    with torch.no_grad():
        model.get_parameter(name).mul_(1.7)
    after = model.get_parameter(name).detach()
    for strength in (0.0, 0.4, 1.0):
        patch = trained_patch(base, model, [name], strength=strength)
        result = overlay(base, patch, by="x")
        assert torch.equal(result.load(name), interpolate(base.load(name), after, strength))
        assert patch.metrics["changed_tensors"] == (strength > 0)
    assert overlay(base, trained_patch(base, model, [name], strength=0.0), by="x").raw(name) == base.raw(name)
