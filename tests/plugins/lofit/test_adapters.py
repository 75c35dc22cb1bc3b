"""Scales and offsets on whole layers do what a loop over heads does, in every family, and their gradients are right."""

import pytest
import torch

from regraft.core.architectures import architecture_of
from regraft.core.residual_bias import HeadOffset, HeadScale
from regraft.core.tensors import MemoryTensor
from regraft.core.training.modules import role_module
from regraft.plugins.lofit.adapters import HeadOffsets, HeadScales, units_of
from tests.core.residual.support import hook, ids, logits
from tests.families import FAMILIES, tiny

VARIANTS = ("falcon-multi-query", "falcon-multi-head", "gpt_neox-sequential", "llama-biased", "starcoder2", "stablelm",
            "gemma3")  # fmt: skip
SITES = ("head", "kv-group")


def roles(model):
    return architecture_of(model.config.to_dict(), list(model.state_dict()))


def random_like(parameters, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)


def memory(vector):
    return MemoryTensor("vector", vector.detach())


def close(one, other, base):
    """Equal but for rounding, and not because nothing was done."""
    assert (one - base).abs().max() > 0.2
    assert (one - other).abs().max() <= 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
@pytest.mark.parametrize("site", SITES)
def test_scales_of_every_head(family, site):
    model = tiny(family)
    architecture = roles(model)
    base = logits(model)
    scales = HeadScales(model, architecture, [0, 1], site)
    random_like(scales.parameters, 0.5, 1)
    with scales.attached():
        ours = logits(model)
    assert torch.equal(logits(model), base), "nothing stays on the model"
    group = architecture.num_heads // units_of(architecture, site)
    by_head = [
        HeadScale(layer, head, memory(rows[head // group]))
        for layer, rows in scales.parameters.items()
        for head in range(architecture.num_heads)
    ]
    close(ours, logits(hook(model, architecture, [], by_head)), base)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
@pytest.mark.parametrize("site", SITES)
def test_offsets_of_some_heads(family, site):
    model = tiny(family)
    architecture = roles(model)
    base = logits(model)
    last = units_of(architecture, site) - 1
    chosen = {0: (last,), 1: (0, last)} if last else {0: (0,), 1: (0,)}
    offsets = HeadOffsets(model, architecture, chosen, site)
    with offsets.attached():
        assert torch.equal(logits(model), base), "offsets of 0 change no bit"
    random_like(offsets.parameters, 1.0, 2)
    with offsets.attached():
        ours = logits(model)
    assert torch.equal(logits(model), base), "nothing stays on the model"
    expected = [HeadOffset(layer, unit, memory(vector), site) for (layer, unit), vector in offsets.vectors().items()]
    assert [(one.layer, one.head) for one in expected] == [(layer, unit) for layer in chosen for unit in chosen[layer]]
    close(ours, logits(hook(model, architecture, expected)), base)


def test_scales_of_0_change_no_bit():
    model = tiny("llama")
    base = logits(model)
    with HeadScales(model, roles(model), [0, 1], "head", std=0.0).attached():
        assert torch.equal(logits(model), base)


def test_the_draw_of_the_scales():
    model = tiny("llama")
    one, same, other = (HeadScales(model, roles(model), [0, 1], "head", seed=seed) for seed in (1, 1, 2))
    values = [torch.cat([part.detach().flatten() for part in each.parameters.values()]) for each in (one, same, other)]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
    assert values[0].std().item() == pytest.approx(1e-3, rel=0.2)


def test_what_learns():
    """Oracle 7: K · d_h numbers, in fp32, and nothing of the model."""
    model = tiny("llama", dtype=torch.bfloat16)
    offsets = HeadOffsets(model, roles(model), {0: (1,), 1: (0, 2)}, "head")
    assert offsets.count == 3 * 16
    assert sorted(offsets.trainable) == ["layers.0.offsets", "layers.1.offsets"]
    assert {one.parameter.dtype for one in offsets.trainable.values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert HeadScales(model, roles(model), [1], "kv-group").count == 2 * 16


def loss_of(model):
    tokens = ids(12)
    found = model(tokens).logits
    return torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "mixtral"])
def test_gradient_of_the_offsets(family):
    """Oracle 6: ∂L/∂v of a head is its columns of W_o, transposed, times the sum of ∂L/∂o over batch and positions."""
    model = tiny(family)
    architecture = roles(model)
    chosen = {0: (0, 3), 1: (2,)}
    offsets = HeadOffsets(model, architecture, chosen, "head")
    outputs = {}
    for layer in chosen:
        module = role_module(model, architecture, "o_proj", layer)
        module.register_forward_hook(lambda m, a, output, layer=layer: outputs.setdefault(layer, output).retain_grad())
    with offsets.attached():
        for parameter in offsets.parameters.values():
            parameter.requires_grad_(True)
        # attached after our hooks: they see o_proj's own output, so we let the input ask for a gradient as well
        model.get_input_embeddings().weight.requires_grad_(True)
        loss_of(model).backward()
    for layer, heads in chosen.items():
        slot = architecture.slot("o_proj", layer)
        weight = role_module(model, architecture, "o_proj", layer).weight
        weight = weight.t() if slot.transposed else weight
        total = outputs[layer].grad.sum((0, 1))
        for number, head in enumerate(heads):
            expected = weight[:, architecture.head_columns(head)].t() @ total
            found = offsets.parameters[layer].grad[number]
            assert found.abs().max() > 1e-4
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["offsets", "scales"])
@pytest.mark.parametrize("site", SITES)
def test_directional_derivative(kind, site):
    """Oracle 6: central differences with a step of 1e-3; norms compute in fp32, so smaller ones measure rounding."""
    model = tiny("llama")
    architecture = roles(model)
    if kind == "offsets":
        adapters = HeadOffsets(model, architecture, {0: (0, 1), 1: (1,)}, site)
    else:
        adapters = HeadScales(model, architecture, [0, 1], site)
    random_like(adapters.parameters, 0.1, 3)
    start = {layer: one.data.clone() for layer, one in adapters.parameters.items()}
    direction = {
        layer: torch.randn(one.shape, generator=torch.Generator().manual_seed(4)) for layer, one in start.items()
    }
    for one in adapters.parameters.values():
        one.requires_grad_(True)
    with adapters.attached():
        loss_of(model).backward()
        slope = sum((adapters.parameters[layer].grad * way).sum().item() for layer, way in direction.items())
        losses = []
        for step in (1e-3, -1e-3):
            for layer, one in adapters.parameters.items():
                one.data = start[layer] + step * direction[layer]
            losses.append(loss_of(model).item())
    assert abs(slope) > 0.05
    assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_penalty():
    """λ·Σ|A|, whose gradient is λ times the sign (oracle 10)."""
    model = tiny("llama")
    scales = HeadScales(model, roles(model), [0, 1], "head", seed=5)
    for one in scales.parameters.values():
        one.requires_grad_(True)
    penalty = scales.penalty(0.25)()
    total = sum(one.detach().abs().sum().item() for one in scales.parameters.values())
    assert penalty.item() == pytest.approx(0.25 * total, rel=1e-6)
    penalty.backward()
    for one in scales.parameters.values():
        assert torch.equal(one.grad, 0.25 * one.detach().sign())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_scales_are_not_rounded_away_in_bf16(dtype):
    """1 + 0.001 is 1 in bf16; the change of o_proj's output is still 0.001 of what it was."""
    model = tiny("llama", dtype=dtype)
    architecture = roles(model)
    scales = HeadScales(model, architecture, [0], "head", std=0.0)
    scales.parameters[0].data.fill_(1e-3)
    seen = []
    module = role_module(model, architecture, "o_proj", 0)

    def run():
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(ids(12))

    handle = module.register_forward_hook(lambda m, a, output: seen.append(output.float()))
    run()
    handle.remove()
    with scales.attached():
        handle = module.register_forward_hook(lambda m, a, output: seen.append(output.float()))
        run()
        handle.remove()
    plain, scaled = seen
    change = (scaled - plain).flatten() @ plain.flatten() / (plain.flatten() @ plain.flatten())
    assert change.item() == pytest.approx(1e-3, rel=0.02)


def test_columns_of_a_quantised_projection(tiny_folder):
    """Offsets act with the weights that the model computes with, which bitsandbytes holds in four bits."""
    from bitsandbytes.functional import dequantize_4bit

    from tests.core.training.support import model_of

    model = model_of(tiny_folder("llama"), quantize="nf4")
    plain = tiny("llama")
    architecture = roles(plain)
    weight = role_module(model, architecture, "o_proj", 1).weight
    whole = dequantize_4bit(weight.data, weight.quant_state).float()  # before a forward pass packs it otherwise
    offsets = HeadOffsets(model, architecture, {1: (0, 3)}, "head")
    full = role_module(plain, architecture, "o_proj", 1).weight
    stored = torch.cat([full[:, :16], full[:, 48:]], 1)
    expected = torch.cat([whole[:, :16], whole[:, 48:]], 1)
    assert (expected - stored).abs().max() > 0.01
    torch.testing.assert_close(offsets.columns[1], expected, rtol=0, atol=4e-3)  # its products may be bf16 inside
