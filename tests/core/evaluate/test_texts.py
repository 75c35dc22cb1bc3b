"""Every token of a text counts once, and its bytes are those of the text."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.core.data.examples import IGNORED
from regraft.core.evaluate.texts import Text, TextParams, _text, read_texts, windows
from regraft.core.sources import open_checkpoint
from regraft.core.training.model import materialise_tokenizer


@cache
def tokenizer():
    return materialise_tokenizer(open_checkpoint("demo:tiny"))


@given(length=st.integers(1, 60), size=st.integers(2, 20), stride=st.integers(1, 19) | st.none(), begins=st.booleans())
def test_windows_count_each_token_once(length, size, stride, begins):
    stride = None if stride is None or stride >= size else stride
    text = Text("t", [100 + number for number in range(length)], [0] * length, [1] * length)
    seen = []
    for window in windows(text, size=size, stride=stride, start=7 if begins else None):
        ids, labels = list(window.example.ids), list(window.example.labels)
        counted = [label for label in labels if label != IGNORED]
        assert len(ids) <= size
        assert (ids[0] == 7) == begins
        assert counted == text.ids[window.first : window.first + window.count] == ids[-window.count :]
        assert labels[0] == IGNORED
        if stride is not None and window.first > 1:
            assert window.count <= stride
        body = ids[1:] if begins else ids
        assert body == list(range(body[0], body[0] + len(body)))
        seen += counted
    assert seen == text.ids[0 if begins else 1 :]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=80))
def test_bytes_of_tokens_are_those_of_the_text(text):
    found = _text(tokenizer(), text, "t", 10)
    assert sum(found.sizes) == (len(text.encode()) if found.ids else 0)
    assert list(found.blocks) == sorted(found.blocks)


def test_texts_of_files_and_columns(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"story": "three"}\n')
    files = (str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    found = read_texts(TextParams(data=files, unit="line"), tokenizer())
    assert [tokenizer().decode(text.ids) for text in found] == ["one", "two", "three"]
    assert len({text.name for text in found}) == 3
    assert len(read_texts(TextParams(data=files, unit="line", max_texts=2), tokenizer())) == 2
    with pytest.raises(ValueError, match="stride is less than window"):
        TextParams(data=files, window=10, stride=10)
