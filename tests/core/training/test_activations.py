"""Activations of prompts at the sites of every family, against hooks of the test's own; entropies in closed form."""

import math

import pytest
import torch

from regraft.core.architectures import architecture_of
from regraft.core.errors import InputError, Unsupported
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.activations import Probe, Site, next_token_entropy
from regraft.core.training.model import materialise_model
from tests.families import FAMILIES

PROMPTS = [[5, 9, 33], [7], [60, 61, 62, 63, 64, 65, 66], [40, 41]]
DENSE = [family for family in FAMILIES if family not in ("mixtral", "qwen3_moe")]
NOT_RESIDUAL = ("gemma2", "gemma3_text", "olmo2", "glm4", "granite")
"""Families with a norm or a multiplier behind the MLP."""


def opened(folder):
    checkpoint = open_checkpoint(folder)
    return materialise_model(checkpoint), architecture_of(checkpoint.config, checkpoint.specs)


def plain(model, architecture, prompt):
    """Activations of one prompt without padding, and logits behind it, from hooks written here."""
    found = {}

    def keep(name, value):
        found[name] = (value[0] if isinstance(value, tuple) else value)[0].clone()  # falcon adds to it in place

    handles = []
    for layer in range(architecture.num_layers):
        for role, kind in (("o_proj", "attn_out"), ("down_proj", "mlp_out")):
            module = model.get_submodule(architecture.slot(role, layer).module)
            handles.append(module.register_forward_hook(lambda m, a, out, k=(layer, kind): keep(k, out)))
            if role == "o_proj":
                hook = module.register_forward_pre_hook(lambda m, a, k=(layer, "head"): keep(k, a[0]))
                handles.append(hook)
    outputs = model(torch.tensor([prompt]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    for layer in range(architecture.num_layers - 1):  # the last of them has passed the final norm
        found[layer, "residual"] = outputs.hidden_states[layer + 1][0]
    return found, outputs.logits[0, -1]


@pytest.mark.parametrize("family", DENSE)
def test_every_site_of_every_family(family, tiny_folder):
    model, architecture = opened(tiny_folder(family, tokenizer=False))
    sites = [Site(layer, kind) for layer in (0, 1) for kind in ("residual", "attn_out", "mlp_out", "head")]
    for position in ("last", "mean"):
        taken = Probe(model, architecture, batch_size=3, position=position).take(sites, PROMPTS, entropy=True)
        with torch.no_grad():
            single = [plain(model, architecture, prompt) for prompt in PROMPTS]
        for site in sites:
            if (site.layer, site.kind) not in single[0][0]:
                continue
            rows = [found[site.layer, site.kind] for found, _ in single]
            expected = torch.stack(
                [row[-1] if position == "last" else row[min(1, len(row) - 1) :].mean(0) for row in rows]
            )
            values = taken.values[site]
            if site.kind == "head":
                assert values.shape == (len(PROMPTS), architecture.num_heads, architecture.head_dim)
            torch.testing.assert_close(values.flatten(1), expected, rtol=1e-4, atol=1e-5)
        entropies = next_token_entropy(torch.stack([logits for _, logits in single]))
        torch.testing.assert_close(taken.entropies, entropies, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", DENSE)
def test_whether_the_mlp_output_is_the_residual_stream(family, tiny_folder):
    model, architecture = opened(tiny_folder(family, tokenizer=False))
    probe = Probe(model, architecture)
    assert [probe.mlp_adds_to_residual(layer, PROMPTS[0]) for layer in (0, 1)] == [family not in NOT_RESIDUAL] * 2


def test_nothing_is_left_hooked_and_batches_do_not_matter(tiny_folder):
    model, architecture = opened(tiny_folder("llama", tokenizer=False))
    sites, counts = [Site(1, "residual"), Site(0, "head")], []
    one = Probe(model, architecture, batch_size=1, tell=counts.append).take(sites, PROMPTS)
    all_at_once = Probe(model, architecture, batch_size=64).take(sites, PROMPTS)
    assert counts == [1, 2, 3, 4]
    assert one.entropies is None
    for site in sites:
        torch.testing.assert_close(one.values[site], all_at_once.values[site], rtol=1e-4, atol=1e-5)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_entropy_in_closed_form():
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -torch.inf, -torch.inf]],
        dtype=torch.float64,
    )
    exact = [math.log(4), 0.0, math.log(4) - 0.75 * math.log(3)]
    assert next_token_entropy(logits).tolist() == pytest.approx(exact, abs=1e-12)
    two = [math.log(2), 0.0, math.log(4) - 0.75 * math.log(3)]
    assert next_token_entropy(logits, [1, 0]).tolist() == pytest.approx(two, abs=1e-12)
    assert next_token_entropy(logits[:1], [2]).tolist() == [0.0]


def test_what_cannot_be_measured(tiny_folder):
    model, architecture = opened(tiny_folder("llama", tokenizer=False))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(InputError, match="not finite") as caught:
        Probe(model, architecture).take([Site(0, "mlp_out")], PROMPTS)
    assert caught.value.found == "NaN or Inf in 4 of 4 prompts"
    with pytest.raises(Unsupported, match="no such module"):
        Probe(torch.nn.Linear(2, 2), architecture)._module(Site(0, "residual"))
