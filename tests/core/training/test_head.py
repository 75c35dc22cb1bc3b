"""Oracle 16: losses straight from the head equal those of the model's own logits, gradients too, in every family."""

import pytest
import torch
from torch.nn import functional as F

from regraft.core.data.batches import collate
from regraft.core.data.examples import IGNORED, Example, ints
from regraft.core.data.lengths import pack
from regraft.core.errors import Unsupported
from regraft.core.training.head import Head
from tests.core.training.support import model_of, sequence
from tests.families import FAMILIES, tiny

VARIANTS = ("gemma2-untied", "cohere2-biased", "qwen2-tied", "starcoder2")


def batch_of(*examples):
    return collate(examples, tuple(range(len(examples))))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def compare(model, *, fused=True):
    model = model.requires_grad_(True)
    head, plain = Head.of(model), Head.of(model, fused=False)
    assert (head.fused, plain.fused) == (fused, False)
    batch = batch_of(sequence(11, 1, 3), sequence(7, 2))
    ours, theirs = head.label_losses(batch), plain.label_losses(batch)
    logits = model(input_ids=batch.input_ids).logits
    direct = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(theirs, direct, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours, direct, rtol=1e-6, atol=0)
    torch.testing.assert_close(head.label_losses(batch, reduction="none"), plain.label_losses(batch, reduction="none"),
                               rtol=1e-5, atol=1e-5)  # fmt: skip
    one, other = gradients(model, ours), gradients(model, theirs)
    assert set(one) == set(other)
    scale = max(float(value.norm()) for value in other.values())
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_fused_losses_equal_the_models_own(family):
    compare(tiny(family))


def test_softcap_that_bites():
    model = tiny("gemma2", final_logit_softcapping=0.5)
    compare(model)
    assert model.config.final_logit_softcapping == 0.5
    assert model(torch.tensor([[5, 6]])).logits.abs().max() <= 0.5


def test_head_with_a_bias():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("phi", vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                  num_attention_heads=4, pad_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.lm_head.bias is not None
    torch.nn.init.normal_(model.lm_head.bias)
    compare(model)


def test_a_head_of_another_kind_is_noticed():
    model = tiny("llama")

    class Squared(torch.nn.Linear):
        def forward(self, states):
            return super().forward(states).square()

    other = Squared(64, 128, bias=False)
    other.weight = model.lm_head.weight
    model.lm_head = other
    compare(model, fused=False)


def test_labels_of_the_prompt_do_not_matter_and_answers_are_counted():
    """Oracle 12."""
    head = Head.of(tiny("llama"))
    masked = sequence(12, 1, prompt=5)
    batch = batch_of(masked)
    counted = (head.label_losses(batch, reduction="none") != 0).sum()
    assert counted == batch.learnt == masked.learnt == 7
    shifted = Example(masked.ids, ints([IGNORED] * 5) + masked.labels[5:], masked.place)
    assert head.label_losses(batch_of(shifted)) == head.label_losses(batch)
    whole = head.label_losses(batch_of(Example(masked.ids, masked.ids, masked.place)), reduction="none")
    torch.testing.assert_close(head.label_losses(batch), whole[:, 4:].sum())


def test_padding_does_not_matter():
    head = Head.of(tiny("qwen2"))
    short, long = sequence(5, 1), sequence(16, 2)
    together = head.label_losses(batch_of(short, long))
    torch.testing.assert_close(together, head.label_losses(batch_of(short)) + head.label_losses(batch_of(long)))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gpt2", "phi3", "ministral3"])
def test_packed_texts_are_read_apart(family):
    head = Head.of(tiny(family))
    texts = [sequence(5, 1), sequence(4, 2), sequence(7, 3)]
    (packed,), left = pack(texts, 16, restart=True)
    assert left == 0
    apart = sum(head.label_losses(batch_of(text)) for text in texts)
    torch.testing.assert_close(head.label_losses(batch_of(packed)), apart, rtol=1e-5, atol=0)
    (stream,), _ = pack(texts, 16, restart=False)
    assert not torch.isclose(head.label_losses(batch_of(stream)), apart, rtol=1e-3)


def test_a_model_that_reads_packed_texts_as_one_is_refused():
    head = Head.of(tiny("falcon"))
    (packed,), _ = pack([sequence(9, 1), sequence(7, 3)], 16, restart=True)
    with pytest.raises(Unsupported, match="reads packed texts as one"):
        head.label_losses(batch_of(packed))
    (stream,), _ = pack([sequence(9, 1), sequence(7, 3)], 16, restart=False)
    assert head.label_losses(batch_of(stream)) > 0


def test_directional_derivative(tiny_folder):
    """Oracle 6: a step of 1e-3 along a direction changes the loss as the gradient says."""
    model = model_of(tiny_folder("llama")).requires_grad_(True)
    head, batch = Head.of(model), batch_of(sequence(12, 1))
    weight = model.model.layers[0].self_attn.o_proj.weight
    gradient = gradients(model, head.label_losses(batch))["model.layers.0.self_attn.o_proj.weight"]
    direction = gradient.sign() / gradient.numel() ** 0.5
    slope = (gradient * direction).sum()
    values = []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            weight.add_(direction, alpha=step)
            values.append(head.label_losses(batch).double())
    assert abs(slope) > 0.1
    torch.testing.assert_close((values[0] - values[1]).float() / 2e-2, slope, rtol=5e-3, atol=0)
