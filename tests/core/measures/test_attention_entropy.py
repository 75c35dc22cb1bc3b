"""Attention entropy against closed forms, eager attention's own weights, and sums written out in double precision."""

import math
from itertools import pairwise

import pytest

from regraft.core.errors import Unsupported
from regraft.core.measures.attention_entropy import attention_entropy, entropy_of_queries
from regraft.core.measures.reading import _pieces, read
from tests.families import tiny
from tests.plain_entropy import plain_entropy

LENGTH = 60


def ids(length=LENGTH):
    import torch

    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def without_queries(family, **overrides):
    """A model whose every logit is 0: all keys in sight get the same weight."""
    model = tiny(family, **overrides)
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.weight.zero_()
    return model


@pytest.mark.parametrize(("family", "window"), [("llama", None), ("llama-multi-head", None), ("mistral", 16)])
def test_uniform_attention_has_the_logarithm_of_the_keys_in_sight(family, window):
    import torch

    overrides = {} if window is None else {"sliding_window": window}
    found = attention_entropy(without_queries(family, **overrides), ids(), range(LENGTH))
    expected = torch.tensor([math.log(min(position + 1, window or LENGTH)) for position in range(LENGTH)])
    assert found.shape == (2, 4, LENGTH)
    assert torch.allclose(found, expected.expand_as(found), atol=1e-6)


def test_attention_to_one_key_has_none_which_a_second_softmax_would_hide():
    import torch

    query = torch.zeros(1, 1, 8, 4)
    key = torch.zeros(1, 1, 8, 4)
    query[..., 0], key[0, 0, 3, 0] = 100.0, 100.0
    entropies = entropy_of_queries(query, key, key, is_causal=True)[0, 0]
    assert torch.allclose(entropies[:3], torch.tensor([math.log(one) for one in (1, 2, 3)]))
    assert entropies[3:].max() < 1e-6


PLAIN = {
    "llama": {},
    "llama-wide-heads": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "ministral3": {},
    "ministral3 with a sliding window": {"sliding_window": 24},
}


@pytest.mark.parametrize("case", PLAIN)
def test_rows_are_those_of_sums_written_out_in_double_precision(case):
    """Grouped queries, sliding windows, and the scale that Ministral3 puts on queries beyond its window."""
    model = tiny(case.split()[0], **PLAIN[case])
    expected = plain_entropy(model, ids())
    for scores in (1, 1 << 26):
        found = attention_entropy(model, ids(), range(LENGTH), scores=scores)
        assert (found.double() - expected).abs().max() < 2e-5
        assert found.std() > 0.1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "glm4",
                                    "olmo2", "granite", "cohere2", "smollm3"])  # fmt: skip
def test_every_family_whole_or_in_pieces_is_what_eager_attention_weighs(family):
    """Soft caps, norms of queries, shared sliding layers, experts: nothing of a family is known to the measurement."""
    import torch

    model, eager = tiny(family), tiny(family)
    eager.set_attn_implementation("eager")
    weights = eager(torch.tensor([ids()]), output_attentions=True).attentions
    expected = torch.stack([torch.special.entr(one[0].double()).sum(-1) for one in weights])
    for one, scores in ((model, 1), (model, 1 << 26), (eager, 1)):
        found = attention_entropy(one, ids(), range(LENGTH), scores=scores)
        assert (found.double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("family", ["falcon", "falcon-multi-query"])
def test_classes_without_the_attention_interface(family):
    import torch

    model = tiny(family)
    whole = attention_entropy(model, ids(), range(LENGTH))
    assert torch.allclose(whole, attention_entropy(model, ids(), range(LENGTH), scores=1), atol=2e-5)
    assert whole[..., 0].abs().max() < 1e-6
    assert whole.std() > 0.1


def test_only_the_rows_asked_for():
    import torch

    model, some = tiny("llama"), [0, 7, 31, 59]
    whole = attention_entropy(model, ids(), range(LENGTH))
    for scores in (1, 1 << 26):
        assert torch.allclose(attention_entropy(model, ids(), some, scores=scores), whole[..., some], atol=2e-6)


def test_no_more_scores_are_held_than_allowed():
    """Of a piece, heads times its tokens times those of the text; a piece has sixteen tokens at least."""
    model, pieces = tiny("llama"), []
    read(model, ids(), scores=4 * 20 * LENGTH, watch=lambda start, stop: pieces.append((start, stop)))
    assert pieces == [(0, 20), (20, 40), (40, 60)]


@pytest.mark.parametrize("size", [16, 17, 100])
def test_pieces_are_the_whole_and_never_a_single_token(size):
    for length in range(2, 200):
        pieces = list(_pieces(length, size))
        assert pieces[0][0] == 0
        assert pieces[-1][1] == length
        assert all(one[1] == two[0] for one, two in pairwise(pieces))
        assert all(2 <= stop - start <= size for start, stop in pieces)


def test_reading_in_pieces_ends_with_the_same_logits():
    import torch

    for family in ("llama", "mistral", "gemma2"):
        model = tiny(family)
        whole = model(torch.tensor([ids()])).logits[0, -1]
        logits, cache = read(model, ids(), scores=1)
        assert torch.allclose(logits, whole, atol=2e-5)
        assert cache.get_seq_length() == LENGTH


def test_attention_that_cannot_be_seen_is_refused():
    import torch
    from transformers import AttentionInterface

    def hidden(module, query, key, value, mask, **options):
        scores = (query @ key.repeat_interleave(2, 1).transpose(-1, -2)).exp()
        weights = scores / scores.sum(-1, keepdim=True)
        return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2), None

    AttentionInterface.register("unseen", hidden)
    model = tiny("llama")
    model.config._attn_implementation = "unseen"
    with torch.no_grad(), pytest.raises(Unsupported, match="can be measured") as raised:
        attention_entropy(model, ids(), [3])
    assert raised.value.expected.startswith("2 calls")
