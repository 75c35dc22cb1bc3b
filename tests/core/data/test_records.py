"""What a row means, by its columns."""

import pytest

from regraft.core.data.records import Chat, Completion, Preference, Text, find_columns
from regraft.core.data.rows import Place, Row
from regraft.core.errors import InputError, UsageError

ASSISTANT = {"role": "assistant", "content": "b"}
USER = {"role": "user", "content": "a"}


def record(values, **options):
    row = Row(values, Place("data", 1))
    return find_columns(values, where="data", **options).record(row)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": "a", "id": 1}, Text("a")),
        ({"Question": "a", "Answer": "b"}, Completion("a", "b")),
        ({"prompt": "", "completion": "b"}, Completion("", "b")),
        ({"instruction": "a", "output": "b", "text": "ab"}, Completion("a", "b")),
        ({"messages": [USER, ASSISTANT]}, Chat((USER, ASSISTANT))),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, Chat((USER, ASSISTANT))),
        ({"prompt": [USER], "completion": [ASSISTANT]}, Chat((USER, ASSISTANT), 1)),
        ({"prompt": [USER], "completion": "b"}, Chat((USER, ASSISTANT), 1)),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Preference(Completion("a", "b"), Completion("a", "c"))),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "c"}]},
            Preference(Chat((USER, ASSISTANT)), Chat((USER, {**ASSISTANT, "content": "c"}))),
        ),
    ],
)
def test_kind_by_column_names(values, expected):
    assert record(values) == expected


def test_named_columns_and_kind():
    values = {"prompt": "x", "story": "s", "Best Answer": "b", "Incorrect": "c", "Question": "q"}
    given = {"prompt": "Question", "chosen": "Best Answer", "rejected": "Incorrect"}
    assert record(values, given=given) == Preference(Completion("q", "b"), Completion("q", "c"))
    assert record({"prompt": "x", "completion": "y", "text": "t"}, kind="text") == Text("t")


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"a": "1"}, {}, "do not say what the rows are"),
        ({"text": "1"}, {"kind": "chat"}, "do not say what the rows are"),
        ({"prompt": "a", "question": "b", "answer": "c"}, {}, "several columns may play this role"),
        ({"text": "1"}, {"given": {"text": "body"}}, "no such column"),
        ({"text": "1"}, {"given": {"words": "text"}}, "no such role"),
    ],
)
def test_columns_that_do_not_fit(values, options, message):
    with pytest.raises(UsageError, match=message):
        record(values, **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": " \n"}, "text is empty"),
        ({"text": 3}, "text is no text"),
        ({"text": "a\ud800"}, "surrogate"),
        ({"prompt": None, "completion": "b"}, "prompt is missing"),
        ({"prompt": "a", "completion": None}, "completion is missing"),
        ({"prompt": "a", "completion": " "}, "completion is empty"),
        ({"messages": []}, "no list of messages"),
        ({"messages": "a"}, "no list of messages"),
        ({"messages": ["a"]}, r"messages\[0\] is no message"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] has no content"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\] has no role"),
        ({"messages": [{"role": "user", "content": "a\udfff"}]}, "surrogate"),
    ],
)
def test_rows_that_cannot_be_used(values, message):
    with pytest.raises(InputError, match=message):
        record(values)
