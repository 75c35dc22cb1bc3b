"""Scores of options against logits written out; what files are refused, and where they say it."""

import json

import pytest
import torch

from regraft.core.data.rows import Place
from regraft.core.errors import InputError
from regraft.core.measures.choices import Choice, Scored, accuracy, read_choices, score_choices
from tests.families import save_tokenizer, tiny

GOOD = {"prompt": "Fire is", "options": [" hot", " cold"], "answer": 0}


def choice(prompt, *options, answer=0):
    return Choice(prompt, options, answer, Place("some.jsonl", 1))


CHOICES = [
    choice("one, two,", " three", " four!", " no", answer=1),
    choice("a longer prompt than the other is", "x", "y"),
    choice("short", "?", "!", "...", answer=2),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def by_hand(model, tokenizer, one):
    """Every option on its own, in float64."""
    found = []
    for option in one.options:
        prompt, whole = tokenizer(one.prompt)["input_ids"], tokenizer(one.prompt + option)["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        found.append(sum(log_p[at - 1, whole[at]].item() for at in range(len(prompt), len(whole))))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon"])
def test_scores_are_log_probabilities_of_the_options_tokens(family, tokenizer):
    model = tiny(family)
    for size in (1, 3, 16):
        for one, scored in zip(CHOICES, score_choices(model, tokenizer, CHOICES, batch_size=size), strict=True):
            assert scored.choice is one
            assert scored.log_probs == pytest.approx(by_hand(model, tokenizer, one), abs=2e-4)
            assert scored.tokens == tuple(len(option) for option in one.options)


def test_options_of_one_token_share_a_reading(tokenizer):
    """And a normalisation divides by what it says."""
    model, calls = tiny("llama"), []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))
    plain = score_choices(model, tokenizer, CHOICES[1:2], batch_size=1)[0]
    assert len(calls) == 1
    assert plain.scores == plain.log_probs
    for name, part in (("tokens", 3), ("characters", 3)):
        scored = score_choices(model, tokenizer, CHOICES[2:], normalise=name)[0]
        assert scored.scores[2] == pytest.approx(scored.log_probs[2] / part)


def test_what_is_chosen():
    one = choice("", "a", "b", answer=1)
    right, wrong = Scored(one, (-2.0, -1.0), (1, 1), (-2.0, -1.0)), Scored(one, (-1.0, -1.0), (1, 1), (-1.0, -1.0))
    assert (right.correct, wrong.correct, accuracy([right, wrong])) == (True, False, 0.5)
    assert right.answer_log_prob == pytest.approx(-torch.tensor(-1.0).exp().log1p().item())


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_are_read(tmp_path):
    """Answers by number, by text, and by text without the space."""
    rows = [GOOD, {**GOOD, "answer": " cold"}, {**GOOD, "answer": "cold", "id": 7}]
    path = write(tmp_path / "some.jsonl", *rows)
    found = read_choices(path)
    assert [one.answer for one in found] == [0, 1, 1]
    assert [one.place.number for one in found] == [1, 2, 3]
    assert found[0].options == (" hot", " cold")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "is not JSON"),
        ({"prompt": "x"}, "it has no options and no answer"),
        ({**GOOD, "prompt": 3}, "the prompt is not text, found 3"),
        ({**GOOD, "options": "hot"}, "the options are not a list of texts"),
        ({**GOOD, "options": ["a"]}, "it needs two options at least"),
        ({**GOOD, "options": ["a", ""]}, "an option is empty"),
        ({**GOOD, "options": ["a", "b", "a"]}, "an option is given twice: 'a'"),
        ({**GOOD, "answer": 2}, "the answer 2 is neither a number below 2 nor an option"),
        ({**GOOD, "answer": True}, "the answer True is neither"),
        ({**GOOD, "answer": "warm"}, "the answer 'warm' is neither"),
    ],
)
def test_bad_rows_say_file_line_and_reason(tmp_path, row, reason):
    path = write(tmp_path / "some.jsonl", GOOD, row)
    with pytest.raises(InputError) as caught:
        read_choices(path)
    assert reason in caught.value.message
    assert caught.value.where == f"{path}:2"
    assert "max_bad_rows" not in str(caught.value)


def test_files_that_tell_nothing_are_refused(tmp_path):
    turned = {**GOOD, "options": GOOD["options"][::-1], "answer": 1}
    for rows, reason in (((), "no rows"), ((GOOD, turned), "every row has the same options and the same answer")):
        with pytest.raises(InputError, match=reason):
            read_choices(write(tmp_path / "some.jsonl", *rows))
    with pytest.raises(InputError):
        read_choices(tmp_path / "missing.jsonl")


def test_texts_that_do_not_fit_are_refused(tokenizer):
    model = tiny("llama", max_position_embeddings=16)
    with pytest.raises(InputError, match="longer than the model's window"):
        score_choices(model, tokenizer, CHOICES)
    with pytest.raises(InputError, match="no token that follows another"):
        score_choices(model, tokenizer, [choice("", "a", "b")])
