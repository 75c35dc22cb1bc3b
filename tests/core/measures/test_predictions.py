"""Loss, entropy and confidence against logits written out, whatever the batches and chunks."""

import math

import pytest
import torch

from regraft.core.data.lengths import pack
from regraft.core.measures import predictions as module
from regraft.core.measures.predictions import Predictions, predictions
from regraft.core.training.head import Head
from tests.core.training.support import sequence
from tests.families import tiny

FAMILIES = ("llama", "gemma2", "granite", "gpt2", "qwen2-tied", "cohere2-biased")


def by_hand(model, sequences):
    """Each sequence on its own, its distribution written out in float64."""
    losses, entropies, tops = [], [], []
    for one in sequences:
        with torch.no_grad():
            logits = model(torch.tensor([list(one.ids)])).logits[0].double()
        p = logits.softmax(-1)
        for position in range(len(one) - 1):
            if one.labels[position + 1] != -100:
                losses.append(-p[position, one.labels[position + 1]].log())
                entropies.append(-(p[position] * p[position].log()).sum())
                tops.append(p[position].max())
    return [torch.stack(values).mean().item() for values in (losses, entropies, tops)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [True, False])
def test_figures_are_means_over_real_tokens(family, fused):
    """Of sequences of different lengths, which are padded, and one whose prompt does not count."""
    model = tiny(family)
    sequences = [sequence(12, 1), sequence(5, 2), sequence(9, 3, prompt=4)]
    figures = predictions(Head.of(model, fused=fused), sequences, batch_size=2)
    assert figures.tokens == 11 + 4 + 5
    assert [figures.loss, figures.entropy, figures.top_probability] == pytest.approx(
        by_hand(model, sequences), abs=2e-5
    )
    assert figures.perplexity == pytest.approx(math.exp(figures.loss))


def test_batches_and_chunks_do_not_matter(monkeypatch):
    head, sequences = Head.of(tiny("llama")), [sequence(4 + 3 * seed, seed) for seed in range(1, 6)]
    whole = predictions(head, sequences)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 3 * 128 * 4)
    pieces = predictions(head, sequences, batch_size=1)
    for name, value in whole.as_json().items():
        assert pieces.as_json()[name] == pytest.approx(value, rel=1e-6)


def test_bounds():
    """A head of zeros knows nothing: entropy ln(V). A large one is sure: entropy 0, and no NaN from 0·ln 0."""
    model, sequences = tiny("llama"), [sequence(12, 1)]
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        sure = predictions(Head.of(model), sequences)
        model.lm_head.weight.zero_()
        blank = predictions(Head(model, model.lm_head, None, fused=True), sequences)
    assert (sure.entropy, sure.top_probability) == pytest.approx((0, 1), abs=1e-3)
    assert blank.entropy == pytest.approx(math.log(128), rel=1e-6)
    assert blank.loss == pytest.approx(math.log(128), rel=1e-6)
    assert blank.top_probability == pytest.approx(1 / 128)


def test_packed_texts_are_read_apart():
    head = Head.of(tiny("llama"))
    texts = [sequence(5, 1), sequence(4, 2), sequence(7, 3)]
    apart, (packed,) = predictions(head, texts), pack(texts, 16, restart=True)[0]
    together, (stream,) = predictions(head, [packed]), pack(texts, 16, restart=False)[0]
    assert together.tokens == apart.tokens == 4 + 3 + 6
    assert together.as_json() == pytest.approx(apart.as_json(), rel=1e-5)
    assert predictions(head, [stream]).loss != pytest.approx(apart.loss, rel=1e-3)


def test_what_is_beyond_a_float():
    assert Predictions(1, 800.0, 0.0, 1.0).perplexity == math.inf
    assert not Predictions(1, 800.0, 0.0, 1.0).finite
    assert not Predictions(1, math.nan, 0.0, 1.0).finite
    assert Predictions(1, 80.0, 0.0, 1.0).finite


def test_nothing_counts():
    with pytest.raises(ValueError, match="no token"):
        predictions(Head.of(tiny("llama")), [])
