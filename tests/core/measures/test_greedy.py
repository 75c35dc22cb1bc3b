"""Greedy continuations: the likeliest token, again and again, as many as asked for, whatever the cache does."""

import pytest
import torch

from regraft.core.errors import UsageError
from regraft.core.measures.greedy import end_tokens, greedy, window_tokens
from tests.families import FAMILIES, tiny


def plainly(model, context, length, never):
    """Without a cache: the whole text again for every token."""
    ids = list(context)
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        logits[list(never)] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[len(context) :]


CONTEXTS = [[5, 9, 17, 30], [6, 7, 8], [100, 4, 50, 60], [12] * 20]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_likeliest_token_each_time(family):
    """Also where layers slide: 20 + 24 tokens pass the window of 16."""
    model = tiny(family)
    found = greedy(model, CONTEXTS, 24, batch_size=2)
    assert found == [plainly(model, context, 24, end_tokens(model)) for context in CONTEXTS]
    assert len({tuple(row) for row in found}) > 1


def test_an_end_token_is_never_chosen():
    model = tiny("llama")
    free = greedy(model, CONTEXTS[:1], 12, never=())
    model.generation_config.eos_token_id = [free[0][1], free[0][4]]
    assert end_tokens(model) == {free[0][1], free[0][4], 2}
    kept = greedy(model, CONTEXTS[:1], 12)
    assert len(kept[0]) == 12
    assert kept[0][0] == free[0][0]
    assert not {free[0][1], free[0][4]} & set(kept[0])


def test_settings_of_generation_do_not_apply():
    model = tiny("llama")
    free = greedy(model, CONTEXTS, 12)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    assert greedy(model, CONTEXTS, 12) == free


def test_no_tokens_and_no_contexts():
    assert greedy(tiny("llama"), CONTEXTS, 0) == [[]] * 4
    assert greedy(tiny("llama"), [], 5) == []


def test_refusals():
    model = tiny("llama")
    assert window_tokens(model) == 128
    assert len(greedy(model, [[5] * 120], 8)[0]) == 8
    with pytest.raises(UsageError, match="longer than the model's window") as caught:
        greedy(model, [[5], [5] * 120], 9)
    assert caught.value.expected == "at most 128 tokens together"
    with pytest.raises(UsageError, match="no tokens"):
        greedy(model, [[5], []], 1)
