"""JSON of checkpoints: bounded and strict reading, merge patches after RFC 7396, and their inverse."""

import json
import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.core import jsonio
from regraft.core.errors import InputError
from regraft.core.jsonio import brief, difference, dump, merge, parse_object, read_object, same

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab☃", max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=2), inner, max_size=3),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text("abc", max_size=2), VALUES, max_size=4)


def without_nulls(value):
    """No null as the value of a key, at any depth outside lists: a merge patch cannot set one."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return value


@pytest.mark.parametrize(
    ("document", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_the_examples_of_rfc_7396(document, patch, result):
    before = json.dumps(document)
    assert merge(document, patch) == result
    assert json.dumps(document) == before


@given(before=OBJECTS, after=OBJECTS)
def test_a_difference_merges_to_what_it_was_taken_from(before, after):
    after = without_nulls(after)
    assert same(merge(before, difference(before, after)), after)


@given(document=OBJECTS)
def test_nothing_differs_from_itself(document):
    assert difference(document, document) == {}
    assert merge(document, {}) == document


@given(document=OBJECTS)
def test_what_is_dumped_is_parsed(document):
    assert same(parse_object(dump(document), "x"), document)


@pytest.mark.parametrize(
    ("old", "new"), [(1, 1.0), (1, True), (0, False), ([1], [1.0]), ([True], [1]), ({"a": [0]}, {"a": [False]})]
)
def test_numbers_and_truth_values_are_told_apart(old, new):
    assert difference({"key": old}, {"key": new}) != {}


def test_nan_is_the_same_as_itself_and_may_stand_in_a_config():
    config = parse_object(b'{"limits": [0.0, Infinity, NaN]}', "config.json")
    assert difference(config, parse_object(dump(config), "config.json")) == {}


def test_the_order_of_keys_is_no_difference():
    assert same([{"a": 1, "b": 2}], [{"b": 2, "a": 1}])


def test_a_key_twice_is_found_quickly_in_a_large_object():
    pairs = ",".join(f'"{number}":0' for number in range(200_000))
    text = f'{{{pairs},"199999":1}}'.encode()
    started = time.monotonic()
    with pytest.raises(InputError, match="twice") as caught:
        parse_object(text, "vocab.json")
    assert caught.value.found == "'199999'"
    assert time.monotonic() - started < 10


def test_a_pair_of_surrogates_is_one_character():
    assert parse_object(rb'{"a": "\ud83d\ude00"}', "x") == {"a": "😀"}


@pytest.mark.parametrize("text", [rb'{"a": "\ud83d"}', rb'{"\uDE00": 1}', rb'{"a": [{"b": "x\ud83dx"}]}'])
def test_half_a_pair_of_surrogates_is_refused(text):
    with pytest.raises(InputError, match="surrogate"):
        parse_object(text, "x")


def test_a_backslash_before_a_surrogate_is_text():
    assert parse_object(rb'{"a": "\\ud83d"}', "x") == {"a": "\\ud83d"}


def test_a_large_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, jsonio.MAX_JSON_BYTES + 1)
    monkeypatch.setattr(type(path), "read_bytes", lambda path: pytest.fail("it is read"))
    with pytest.raises(InputError, match="too large") as caught:
        read_object(path)
    assert "config.json" in str(caught.value)


def test_large_data_is_refused(monkeypatch):
    monkeypatch.setattr(jsonio, "MAX_JSON_BYTES", 10)
    with pytest.raises(InputError, match="too large"):
        parse_object(b'{"key": 12345}', "x")


@pytest.mark.parametrize("name", ["nothing.json", "."])
def test_what_cannot_be_opened_is_an_input_error(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read"):
        read_object(tmp_path / name)


def test_untrusted_values_are_shown_briefly():
    assert len(brief("x" * 10_000)) < 200
    assert len(brief(list(range(10_000)))) < 200
    assert len(brief({str(number): 10**4000 for number in range(100)})) < 400
    assert brief("a\x1b[2J") == r"'a\x1b[2J'"
