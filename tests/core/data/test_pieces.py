"""Plain texts that are read in pieces: the rows of the whole text, and no more of it held than a piece."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.data import readers
from regraft.core.data.load import read_rows
from regraft.core.data.rows import BadRows
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError

TEXTS = st.lists(st.sampled_from(["a", "é", "猫", "\n", "\r\n", "\r", " ", "\u2028", "\n\n", "word", "\ufeff"])).map(
    "".join
)


def rows(path, pieces=None, **values):
    source = DataSettings(source=str(path), **values)
    return [
        (row.place.number, row.values["text"])
        for row in read_rows(str(path), source, BadRows(), piece_characters=pieces)
    ]


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, read=st.integers(1, 7), least=st.integers(1, 9))
def test_pieces_are_the_whole_text_and_lines_those_of_splitlines(tmp_path_factory, text, read, least):
    path = tmp_path_factory.mktemp("x") / "a.txt"
    path.write_bytes(text.encode())
    text = text.removeprefix("\ufeff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_READ_BYTES", read)
        lines = text.splitlines(keepends=True)
        assert rows(path, text_unit="line") == [
            (n, line.rstrip("\r\n")) for n, line in enumerate(lines, 1) if line.strip()
        ]
        assert rows(path) == ([(1, text)] if text.strip() else [])
        found = rows(path, least)
        if text.strip():
            assert "".join(piece for _, piece in found) == text
        for (_, one), (number, other) in pairwise(found):
            assert len(one) >= least
            assert one.endswith("\n")
            assert not other[0].isspace()
            assert number == 1 + text[: text.index(one + other) + len(one)].count("\n")


def test_a_wrong_byte_is_named_by_its_place_and_what_is_not_read_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_READ_BYTES", 8)
    path = tmp_path / "a.txt"
    path.write_bytes(b"line one\nline two\nline 3 \xe9\n")
    with pytest.raises(InputError, match="not UTF-8") as caught:
        rows(path)
    assert str(caught.value.found).endswith("at byte 25")
    first = next(read_rows(str(path), DataSettings(source=str(path)), BadRows(), piece_characters=4))
    assert first.values["text"] == "line one\n"


def test_little_more_than_a_piece_is_held(tmp_path):
    import tracemalloc

    path = tmp_path / "long.txt"
    line = "".join(random.Random(0).choices("abcdefgh ", k=99)) + "\n"
    path.write_text(line * 160_000)
    source = DataSettings(source=str(path))
    tracemalloc.start()
    found = read_rows(str(path), source, BadRows(), piece_characters=1 << 20)
    sizes = [len(row.values["text"]) for row in found]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == 16_000_000
    assert len(sizes) == 16
    assert peak < 11_000_000
