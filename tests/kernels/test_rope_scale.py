"""Rotation and scale in one against the two apart, forward and backward."""

import math

import pytest
import torch

from regraft.kernels.rope_scale import reference, rope_scale

SHAPES = ((2, 3, 7, 16, 16), (1, 2, 5, 24, 8), (2, 1, 1, 6, 6))
"""B, H, L, D and R; odd numbers of rows, a partly rotated head."""


def operands(shape, dtype=torch.float64, *, batched=False, seed=0):
    batch, heads, length, width, rotary = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, heads, length, width, dtype=torch.float64, generator=generator).to(dtype)
    start = torch.arange(batch if batched else 1)[:, None] * 3
    angle = (start + torch.arange(length))[..., None] * 10.0 ** -torch.arange(rotary // 2).double()
    angle = torch.cat([angle, angle], -1)
    scale = 1 + torch.rand(len(start), length, dtype=torch.float64, generator=generator)
    return x, angle.cos(), angle.sin(), scale


def apart(x, cos, sin, scale):
    """As transformers rotates, then the scale."""
    rotary = cos.shape[-1]
    front, rest = x[..., :rotary], x[..., rotary:]
    one, other = front.chunk(2, -1)
    turned = front * cos[:, None] + torch.cat([-other, one], -1) * sin[:, None]
    return torch.cat([turned, rest], -1) * (1 if scale is None else scale[:, None, :, None])


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_rotation_then_scale(shape):
    for batched in (False, True):
        x, cos, sin, scale = operands(shape, batched=batched)
        x.requires_grad_()
        upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
        for factor in (None, scale):
            ours, expected = rope_scale(x, cos, sin, factor), apart(x, cos, sin, factor)
            assert (ours - expected).abs().max() < 1e-12
            wanted = torch.autograd.grad(expected, x, upstream)[0]
            assert (torch.autograd.grad(ours, x, upstream)[0] - wanted).abs().max() < 1e-12


def test_entropy_scale_of_queries():
    """t = max(1, ln(p + 1) / ln c) multiplies logits, and leaves positions below c as they are to the bit."""
    x, cos, sin, _ = operands((1, 2, 64, 16, 16), torch.float32)
    position = torch.arange(64.0)
    scale = ((position + 1).log() / math.log(16)).clamp_min(1.0)[None]
    ours, plain = rope_scale(x, cos, sin, scale), rope_scale(x, cos, sin)
    assert torch.equal(ours[:, :, :16], plain[:, :, :16])
    assert torch.allclose(ours @ plain.mT, scale[:, None, :, None] * (plain @ plain.mT), rtol=1e-5, atol=1e-5)
    assert (ours[:, :, 63] / plain[:, :, 63]).mean().item() == pytest.approx(6 / 4, rel=1e-5)


def test_rounds_once():
    x, cos, sin, scale = operands((2, 3, 33, 16, 16), torch.bfloat16)
    wide = reference(x.double(), cos, sin, scale)
    assert torch.equal(rope_scale(x, cos, sin, scale), wide.float().to(torch.bfloat16))


def test_what_does_not_fit_is_refused():
    x, cos, sin, scale = operands(SHAPES[0])
    for bad in ((x, cos[:, :3], sin[:, :3], scale), (x[..., :8], cos, sin, scale), (x, cos, sin, scale[:, :2])):
        with pytest.raises(ValueError, match=r"\[B or 1, L"):
            rope_scale(*bad)
    with pytest.raises(ValueError, match="no gradients"):
        rope_scale(x, cos, sin, scale.requires_grad_())
    with pytest.raises(RuntimeError, match="cannot run"):
        rope_scale(x, cos, sin, implementation="triton")
