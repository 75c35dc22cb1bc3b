"""Oracle 6: with the frozen layers cached, losses and gradients are those of the whole model, in every family."""

from types import SimpleNamespace

import pytest
import torch

from regraft.core.architectures import architecture_of
from regraft.core.errors import ResourceError, Unsupported
from regraft.core.training.head import Head
from regraft.core.training.last_mlp import last_mlp
from regraft.core.training.model import switch_gradient_checkpointing
from regraft.core.training.modules import layer_modules, role_module
from regraft.core.training.objectives import CrossEntropy, ReferencePass, answer_log_probs
from regraft.core.training.prefix import PrefixCache, predicted_speed_up
from regraft.core.training.weights import select
from tests.core.training.support import batches, fit, pairs, sequence, sequences
from tests.families import FAMILIES, tiny

VARIANTS = (
    "falcon-multi-query",
    "falcon-sequential",
    "gpt_neox-sequential",
    "qwen3_moe-all-sparse",
    "starcoder2",
    "olmo",
)
DEEP = {
    "llama": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
    "gemma2": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def setting(family, examples, **overrides):
    """A tiny model, its layers, its head, and batches."""
    model = tiny(family, **overrides)
    architecture = architecture_of(model.config.to_dict(), list(model.state_dict()))
    return SimpleNamespace(
        model=model,
        architecture=architecture,
        layers=layer_modules(model, architecture),
        head=Head.of(model),
        data=batches(examples, batch_size=2, shuffle=False),
    )


def above(model, layers, first):
    """Parameters of the layers that run."""
    own = {id(parameter) for layer in layers[first:] for parameter in layer.parameters()}
    return [name for name, parameter in model.named_parameters() if id(parameter) in own]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(it, first, equal, **options):
    cache = PrefixCache(it.head, it.layers, first, it.data, **options)
    for name in above(it.model, it.layers, first):
        it.model.get_parameter(name).requires_grad_(True)
    for step in range(len(it.data)):
        (batch,) = it.data.micro(step)
        whole, ours = it.head.label_losses(batch), cache.head.label_losses(batch)
        equal(ours, whole)
        expected = gradients(it.model, whole)
        found = gradients(it.model, ours)
        assert set(found) == set(expected)
        assert any(one.abs().max() > 1e-3 for one in expected.values())
        for name, gradient in found.items():
            equal(gradient, expected[name])
    return cache


def exactly(one, other):
    assert torch.equal(one, other)


def nearly(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", *VARIANTS])
def test_every_family(family):
    """Sequences of one length: the cached states are computed in batches of the same shape, so all bits agree."""
    cache = compare(setting(family, sequences(4, prompt=3)), 1, exactly)
    assert cache.tokens == 4 * 12
    assert cache.nbytes == 4 * 12 * 64 * 4


@pytest.mark.parametrize("family", DEEP)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_every_first_layer_with_lengths_that_differ(family, first):
    examples = [sequence(length, length, 2) for length in (19, 7, 12, 23)]
    compare(setting(family, examples, **DEEP[family]), first, nearly)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_the_last_mlp_of_learnt_tokens_alone(family):
    """The same but for rounding, where few tokens are learnt; with experts in the last layer it is left alone."""
    it = setting(family, [sequence(length, length, length - 4) for length in (19, 7, 12, 23)])
    module = last_mlp(it.model, it.architecture)
    assert (module is None) == (family in ("mixtral", "qwen3_moe-all-sparse"))
    tokens = []
    if module is not None:
        module.register_forward_hook(lambda module, args, output: tokens.append(output.shape[:-1].numel()))
    compare(it, 1, nearly, last_mlp=module)
    assert module is None or {6, 7, 8} & set(tokens), "it ran for the learnt tokens alone"


def test_pairs_and_their_reference():
    it = setting("llama", pairs(4), **DEEP["llama"])
    cache = compare(it, 2, nearly)
    (batch,) = it.data.micro(1)
    for ours, whole in zip(answer_log_probs(cache.head, batch), answer_log_probs(it.head, batch), strict=True):
        nearly(ours, whole)
    nearly(ReferencePass(cache.head, it.data).log_probs(), ReferencePass(it.head, it.data).log_probs())


def test_texts_that_are_packed():
    from regraft.core.data.lengths import pack

    examples, _ = pack(sequences(6, 9), 16, restart=True)
    compare(setting("llama", examples, **DEEP["llama"]), 2, nearly)


def test_a_whole_training():
    """The same data in the same order: after ten steps the weights are those of the plain loop."""
    results = []
    for cached in (False, True):
        it = setting("llama", [sequence(length, length, 2) for length in range(8, 18)], **DEEP["llama"])
        it.data = batches(it.data.examples, batch_size=2, micro_batch=1, epochs=2)
        head = PrefixCache(it.head, it.layers, 2, it.data).head if cached else it.head
        names = above(it.model, it.layers, 2)
        report = fit(it.model, it.data, names=names, objective=CrossEntropy(head))
        results.append((torch.tensor(report.losses), [it.model.get_parameter(name) for name in names]))
    (plain, weights), (ours, others) = results
    assert plain[0] - plain[-1] > 0.1
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for one, other in zip(others, weights, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_gradient_checkpointing():
    it = setting("llama", sequences(4), **DEEP["llama"])
    cache = PrefixCache(it.head, it.layers, 2, it.data)
    for name in above(it.model, it.layers, 2):
        it.model.get_parameter(name).requires_grad_(True)
    (batch,) = it.data.micro(0)
    expected = gradients(it.model, it.head.label_losses(batch))
    switch_gradient_checkpointing(it.model)
    it.model.train()
    cache.last_mlp = last_mlp(it.model, it.architecture)  # which would run again in the backward pass
    found = gradients(it.model, cache.head.label_losses(batch))
    assert set(found) == set(expected)
    for name, gradient in found.items():
        nearly(gradient, expected[name])


def test_the_lower_layers_do_not_run():
    it = setting("llama", sequences(4), **DEEP["llama"])
    cache = PrefixCache(it.head, it.layers, 2, it.data)
    ran = []
    for number in range(4):
        module = role_module(it.model, it.architecture, "o_proj", number)
        module.register_forward_hook(lambda *args, number=number: ran.append(number))
    (batch,) = it.data.micro(0)
    cache.head.label_losses(batch)
    assert ran == [2, 3]
    ran.clear()
    it.model(batch.input_ids)
    assert ran == [0, 1, 2, 3], "the model is whole again"


def test_states_that_are_too_large():
    it = setting("llama", sequences(4))
    PrefixCache(it.head, it.layers, 1, it.data, max_bytes=4 * 12 * 64 * 4)
    with pytest.raises(ResourceError, match="larger than they may be") as caught:
        PrefixCache(it.head, it.layers, 1, it.data, max_bytes=4 * 12 * 64 * 4 - 1)
    assert caught.value.found == "12288 bytes (48 tokens of 64 numbers)"
    assert not it.layers[0]._forward_hooks, "nothing stays on the model"


def test_a_model_whose_upper_layers_read_more_than_states():
    """A value that goes past the states, as shared keys and values do in some families."""
    it = setting("llama", sequences(4), **DEEP["llama"])
    kept = []
    it.layers[0].register_forward_hook(lambda module, args, output: kept.append(output))
    it.layers[3].register_forward_hook(lambda module, args, output: output + kept[-1] * kept[-1].std())
    with pytest.raises(Unsupported, match="cannot be cached") as caught:
        PrefixCache(it.head, it.layers, 2, it.data)
    assert "read more than the states" in caught.value.found


def test_layers_that_give_more_than_states():
    it = setting("llama", sequences(4))
    it.layers[0].register_forward_hook(lambda module, args, output: (output, output))
    with pytest.raises(Unsupported, match="cannot be cached") as caught:
        PrefixCache(it.head, it.layers, 1, it.data)
    assert "more than its states" in caught.value.found


def test_prediction():
    assert predicted_speed_up(12, 0) == 1.0
    assert predicted_speed_up(12, 6) == 1.5
    assert predicted_speed_up(12, 11) == 6.5


def test_nothing_learns_below():
    """The cached states ask for no gradient, so what stands below gets none."""
    it = setting("llama", sequences(4), **DEEP["llama"])
    cache = PrefixCache(it.head, it.layers, 2, it.data)
    for one in select(it.model).values():
        one.parameter.requires_grad_(True)
    (batch,) = it.data.micro(0)
    found = gradients(it.model, cache.head.label_losses(batch))
    assert not any(name.startswith(("model.layers.0.", "model.layers.1.")) for name in found)
    assert "model.layers.2.self_attn.o_proj.weight" in found
