"""Deltas on a running model are the deltas of merged weights, row by row."""

import pytest
import torch

from regraft.core.architectures import architecture_of
from regraft.plugins.vlora.generator import new_generator
from regraft.plugins.vlora.settings import settings_for
from regraft.plugins.vlora.train_attach import Attached
from tests.families import tiny

C = 1.2784645427610738
"""silu(C) = 1."""
IDS = torch.tensor([[1, 5, 9, 33, 7], [1, 60, 22, 8, 90], [1, 44, 3, 71, 12]])


def sighted(family, *, types, every=1, **overrides):
    """A float64 model, a generator with random B, and the attachment."""
    model = tiny(family, **overrides).double()
    architecture = architecture_of(model.config.to_dict(), dict(model.named_parameters()))
    settings = settings_for(architecture, types=types, skip_layers=every, dim=32, depth=1, heads=4, rank=3, alpha=1.5,
                            visual_dim=6, pos_num=5)  # fmt: skip
    generator = new_generator(settings, 0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.B.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    keys = [(kind, layer) for kind in types for layer in settings.active_layers]
    return model, architecture, generator.double(), Attached(model, architecture, keys, settings.scale)


def features(count):
    return torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def merge(model, architecture, factors, scale):
    """Add every delta to the weights; type m by widening the MLP of a llama."""
    for (kind, layer), (A, B) in factors.items():
        delta = scale * B @ A[0].T
        if kind == "m":
            widen(model.model.layers[layer].mlp, A[0], scale * B)
            continue
        slot = architecture.slot({"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}[kind], layer)
        weight = model.get_submodule(slot.module).weight
        weight.copy_(slot.write(weight, slot.read(weight) + delta))


def widen(mlp, A, B):
    """Neurons whose gate is always 1."""
    for name, rows, bias in (("gate_proj", torch.zeros_like(A.T), C), ("up_proj", A.T, 0.0)):
        old = getattr(mlp, name)
        new = torch.nn.Linear(old.in_features, old.out_features + len(rows), dtype=rows.dtype)
        new.weight.copy_(torch.cat([old.weight, rows]))
        new.bias.copy_(torch.cat([torch.zeros(old.out_features), torch.full((len(rows),), bias)]))
        setattr(mlp, name, new)
    mlp.down_proj.weight = torch.nn.Parameter(torch.cat([mlp.down_proj.weight, B], 1))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "types"),
    [("llama", "qkvom"), ("llama-wide-heads", "qkvo"), ("qwen3", "qo"), ("gemma3_text", "kv"), ("gpt2", "qkvo"),
     ("phi3", "qkv"), ("gpt_neox", "kvo"), ("falcon", "qv")],
)  # fmt: skip
def test_attached_is_merged(family, types):
    model, architecture, generator, attached = sighted(family, types=types)
    factors = generator(features(1))
    before = logits(model, IDS)
    with attached.attached():
        attached.see(factors, torch.zeros(3, dtype=torch.int64))
        seen = logits(model, IDS)
    assert torch.equal(logits(model, IDS), before), "afterwards the model is the base"
    merge(model, architecture, factors, generator.scale)
    torch.testing.assert_close(logits(model, IDS), seen, rtol=0, atol=2e-6)  # norms compute in fp32
    assert (seen - before).abs().max() > 0.01


@torch.no_grad()
def test_every_row_has_its_own_picture_and_rows_without_one_are_the_base_exactly():
    model, _, generator, attached = sighted("llama", types="qkvom")
    base, pictures = logits(model, IDS), features(2)
    with attached.attached():
        attached.see(generator(pictures), torch.tensor([1, -1, 0]))
        together = logits(model, IDS)
        for row, picture in ((0, 1), (2, 0)):
            attached.see(generator(pictures[picture][None]), torch.tensor([0]))
            alone = logits(model, IDS[row][None])
            torch.testing.assert_close(together[row][None], alone, rtol=0, atol=2e-6)
            assert (together[row] - base[row]).abs().max() > 0.01
    assert torch.equal(together[1], base[1])


@torch.no_grad()
def test_only_active_layers_change():
    model, _, generator, attached = sighted("llama", types="vm", every=2, num_hidden_layers=4)
    states = []
    with attached.attached():
        for rows in ([-1], [0]):
            attached.see(generator(features(1)), torch.tensor(rows))
            states.append(model(input_ids=IDS[:1], output_hidden_states=True, use_cache=False).hidden_states)
    changed = [not torch.equal(one, other) for one, other in zip(*states, strict=True)]
    assert changed == [False, False, True, True, True], "the output of layer 1 is the first that differs"
