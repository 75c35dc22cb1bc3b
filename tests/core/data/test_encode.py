"""Oracle 12: which tokens are learnt, by the text they hold, whatever the tokenizer."""

import pytest

from regraft.core.data.encode import Encoder
from regraft.core.data.examples import IGNORED
from regraft.core.data.records import Chat, Completion, Preference, Text
from regraft.core.data.rows import Place
from regraft.core.errors import InputError, Unsupported
from tests.core.data.vocabularies import KINDS, tokenizer

HERE = Place("data.jsonl", 1)
PAIRS = [
    ("The capital of France is", " Paris."),
    ("Q: What is two and two? A: ", "It is four."),
    ("Q: What?\n\n", "\n\nIt is\n\n four\n\n"),
    ("", "It is four."),
    ("Élodie said: naïve ", "café, 东京 🙂."),
    ("A king wen", "t to the city"),
]


def learnt_ids(example):
    return [one for one, label in zip(example.ids, example.labels, strict=True) if label != IGNORED]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_answer_tokens_are_those_after_the_prompt(kind, prompt, answer):
    coder = tokenizer(kind)
    example = Encoder(coder).encode(Completion(prompt, answer), HERE)
    ids = coder(prompt + answer)["input_ids"]
    assert list(example.ids) == [*ids, coder.eos_token_id]
    learnt = [label != IGNORED for label in example.labels]
    first = learnt.index(True)
    assert all(learnt[first:])
    assert not any(learnt[:first])
    before = coder(prompt)["input_ids"]
    shared = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
    assert first == shared, "the first token that the prompt alone does not have"
    assert all(label in (IGNORED, one) for one, label in zip(example.ids, example.labels, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_without_offsets_the_same_tokens_are_learnt(kind):
    coder = tokenizer(kind)

    class Slow:
        is_fast, eos_token_id, chat_template = False, coder.eos_token_id, coder.chat_template
        apply_chat_template = staticmethod(coder.apply_chat_template)

        def __call__(self, text, add_special_tokens, return_offsets_mapping=False, verbose=False):
            assert not return_offsets_mapping
            return coder(text, add_special_tokens=add_special_tokens)

    for prompt, answer in PAIRS:
        record = Completion(prompt, answer)
        assert Encoder(Slow()).encode(record, HERE) == Encoder(coder).encode(record, HERE)


def test_token_across_the_edge_belongs_to_the_answer():
    coder = tokenizer("byte-level")
    assert coder.tokenize(" city") == ["Ġcity"]
    example = Encoder(coder, end=False).encode(Completion("the ci", "ty"), HERE)
    assert coder.decode(learnt_ids(example)) == " city"


@pytest.mark.parametrize("kind", KINDS)
def test_chat_learns_every_answer_with_its_end(kind):
    coder = tokenizer(kind)
    turns = (
        ("user", "What is two and two?"),
        ("assistant", "It is four."),
        ("user", "So?"),
        ("assistant", "Paris\n\n"),
    )
    example = Encoder(coder).encode(Chat(tuple({"role": r, "content": c} for r, c in turns)), HERE)
    text = coder.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    assert list(example.ids) == coder(text, add_special_tokens=False)["input_ids"]
    assert example.ids.count(coder.bos_token_id) == 1
    learnt = coder.decode(learnt_ids(example))
    assert "".join(char for char in learnt if char not in " ▁\n") == "Itisfour.</s>Paris</s>"
    ends = [i for i, one in enumerate(example.ids) if one == coder.eos_token_id]
    assert [example.labels[i] != IGNORED for i in ends] == [False, True, False, True]
    marks = [label for one, label in zip(example.ids, example.labels, strict=True)
             if one == coder.convert_tokens_to_ids("<|assistant|>")]  # fmt: skip
    assert marks == [IGNORED, IGNORED], "the generation prompt is given, not learnt"


def test_only_answers_after_the_prompt_messages_are_learnt():
    coder = tokenizer("byte-level")
    turns = [("assistant", "Paris."), ("user", "So?"), ("assistant", "Madrid.")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    example = Encoder(coder).encode(Chat(messages, 2), HERE)
    assert coder.decode(learnt_ids(example)).strip() == "Madrid.</s>"


def test_all_tokens_and_no_end():
    coder = tokenizer("byte-level")
    example = Encoder(coder, learn="all", end=False).encode(Completion("The capital", " of France"), HERE)
    assert list(example.labels) == list(example.ids) == coder("The capital of France")["input_ids"]
    assert example.learnt == len(example) - 1


def test_text_is_learnt_whole_and_ended_once():
    coder = tokenizer("characters")
    example = Encoder(coder).encode(Text("abc</s>"), HERE)
    assert example.ids == example.labels
    assert example.ids.count(coder.eos_token_id) == 1


def test_preference_shares_the_prompt():
    coder = tokenizer("byte-level")
    pair = Encoder(coder).encode(Preference(Completion("So", " it"), Completion("So", " is")), HERE)
    prompt = coder("So")["input_ids"]
    for answer, text in ((pair.chosen, " it</s>"), (pair.rejected, " is</s>")):
        assert list(answer.ids[: len(prompt)]) == prompt
        assert list(answer.labels[: len(prompt)]) == [IGNORED] * len(prompt)
        assert coder.decode(learnt_ids(answer)) == text


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Completion("The capital", ""), "the answer has no tokens"),
        (Chat(({"role": "user", "content": "So?"},)), "the chat has no answer"),
        (Text("x"), "fewer than two tokens"),
    ],
)
def test_rows_with_nothing_to_learn(record, reason):
    with pytest.raises(InputError, match=reason):
        Encoder(tokenizer("characters", bos=False), end=False).encode(record, HERE)


def test_template_that_refuses_the_roles():
    template = "{% for m in messages %}{{ raise_exception('roles must alternate') }}{% endfor %}"
    with pytest.raises(InputError, match="roles must alternate"):
        Encoder(tokenizer("characters", template)).encode(Chat(({"role": "user", "content": "a"},)), HERE)


def test_template_that_rewrites_earlier_turns():
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}[gone]{% else %}"
        "{{ m['content'] }}|{% endif %}{% endfor %}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    coder = tokenizer("characters", template)
    with pytest.raises(InputError, match="writes this turn otherwise"):
        Encoder(coder).encode(Chat(messages), HERE)
    example = Encoder(coder).encode(Chat(messages, 3), HERE)
    assert coder.decode(learnt_ids(example)) == "d|"


def test_no_chat_template():
    with pytest.raises(Unsupported, match="no chat template"):
        Encoder(tokenizer("characters", None)).encode(Chat(({"role": "user", "content": "a"},)), HERE)
