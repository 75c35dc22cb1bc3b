"""Positions of keys, against a TOML writer that notes where it puts them."""

import json
from datetime import date, datetime

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.recipe.positions import Position, ScanError, key_positions, parse_key

KEYS = st.one_of(
    st.sampled_from(["a", "b", "use", "target_length", "1", "a-b", "1e3"]), st.text("ab.# \"'\\[]{}=é\n,", max_size=4)
)
SCALARS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.text("ab\"'#=[]{},\\\n\t é\U0001f600", max_size=8),
    st.dates(date(1, 1, 1)),
    st.datetimes(datetime(1, 1, 1)).map(lambda moment: moment.replace(microsecond=0)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3),
        st.lists(st.dictionaries(KEYS, inner, max_size=3), min_size=1, max_size=3),
    ),
    max_leaves=12,
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)


class Writer:
    """Writes a document in styles drawn at random; `first` and `declared` are the offsets of keys."""

    def __init__(self, random):
        self.random = random
        self.end = random.choice(["\n", "\r\n"])
        self.text = ""
        self.first = {}
        self.declared = {}

    def position(self, path):
        offset = self.declared.get(path, self.first[path])
        before = self.text[:offset]
        return Position(before.count("\n") + 1, offset - before.rfind("\n"))

    def body(self, table, path):
        later = []
        for key, value in table.items():
            style = self.style(value)
            if style in ("header", "implicit", "array of tables"):
                later.append((key, value, style))
            else:
                self.noise()
                self.pairs(key, value, style, path, len(path))
        for key, value, style in later:
            self.tables(value, (*path, key), style)

    def style(self, value):
        if isinstance(value, dict):
            only_tables = value and all(isinstance(inner, dict) for inner in value.values())
            return self.random.choice(
                ["header", "inline", *["dotted"] * bool(value), *["implicit"] * bool(only_tables)]
            )
        if isinstance(value, list) and value and all(isinstance(inner, dict) for inner in value):
            return self.random.choice(["array of tables", "plain"])
        return "plain"

    def tables(self, value, path, style):
        self.noise()
        if style == "array of tables":
            for index, item in enumerate(value):
                self.header(path, "[[", "]]")
                self.first[(*path, index)] = self.last
                self.body(item, (*path, index))
        elif style == "header":
            self.header(path, "[", "]")
            self.declared[path] = self.last
            self.body(value, path)
        else:
            for key, inner in value.items():
                self.tables(inner, (*path, key), "header")

    def header(self, path, before, after):
        self.text += before
        self.key(path, 0)
        self.text += after
        self.line_end()

    def pairs(self, key, value, style, path, start):
        path = (*path, key)
        if style == "dotted":
            for inner_key, inner in value.items():
                inner_style = (
                    self.random.choice(["dotted", "inline"]) if isinstance(inner, dict) and inner else "inline"
                )
                self.pairs(inner_key, inner, inner_style, path, start)
            return
        self.key(path, start)
        self.text += self.space() + "=" + self.space()
        self.value(value, path)
        self.line_end()

    def key(self, path, start):
        """The parts of `path` from `start` on, without array indices."""
        for index, part in enumerate(path[start:], start):
            if isinstance(part, int):
                continue
            if index > start:
                self.text += "." + self.space()
            self.last = len(self.text)
            self.first.setdefault(path[: index + 1], self.last)
            self.text += self.key_part(part) + self.space()

    def key_part(self, part):
        styles = [basic(part)]
        if part and all(char.isascii() and (char.isalnum() or char in "-_") for char in part):
            styles.append(part)
        if "'" not in part and "\n" not in part:
            styles.append(f"'{part}'")
        return self.random.choice(styles)

    def value(self, value, path):
        if isinstance(value, dict):
            self.bracketed("{", "}", value.items(), lambda item: self.inline_pair(item, path))
        elif isinstance(value, list):
            self.bracketed("[", "]", enumerate(value), lambda item: self.element(item, path))
        else:
            self.text += self.scalar(value)

    def bracketed(self, before, after, items, write):
        self.text += before + self.blank()
        items = list(items)
        for count, item in enumerate(items, 1):
            write(item)
            self.text += self.blank()
            if count < len(items) or self.random.random() < 0.3:
                self.text += "," + self.blank()
        self.text += after

    def inline_pair(self, item, path):
        self.key((*path, item[0]), len(path))
        self.text += "=" + self.space()
        self.value(item[1], (*path, item[0]))

    def element(self, item, path):
        self.first[(*path, item[0])] = len(self.text)
        self.value(item[1], (*path, item[0]))

    def scalar(self, value):
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, datetime):
            return value.isoformat(sep=self.random.choice("T "))
        if isinstance(value, date):
            return value.isoformat()
        if not isinstance(value, str):
            return repr(value)
        styles = [basic(value)]
        if not set(value) & set("'\n"):
            styles.append(f"'{value}'")
        if "''" not in value:
            styles.append(f"'''{self.end}{value}'''".replace("\n", self.end).replace("\r\r", "\r"))
        if '""' not in value and "\\" not in value:
            styles.append(f'"""{self.end}{value}"""'.replace("\n", self.end).replace("\r\r", "\r"))
            styles.append(f'"""\\{self.end}  {basic(value)[1:-1]}"""' if value[:1].strip() else basic(value))
        return self.random.choice(styles)

    def space(self):
        return self.random.choice(["", " ", "\t "])

    def blank(self):
        return self.random.choice(["", " ", self.end, f" # x = [{self.end}  "])

    def noise(self):
        self.text += self.random.choice(["", self.end, f"  # [c] 'x = \"{self.end}", "  "])

    def line_end(self):
        self.text += self.random.choice([self.end, f"  # a = 1{self.end}", " " + self.end])


def basic(text):
    return json.dumps(text, ensure_ascii=False)


def paths(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


@settings(deadline=None)
@given(DOCUMENTS, st.randoms(use_true_random=False))
def test_every_key_is_found_where_it_was_written(document, random):
    writer = Writer(random)
    writer.body(document, ())
    assert tomli.loads(writer.text) == document
    assert key_positions(writer.text) == {path: writer.position(path) for path in paths(document)}


def test_tables_dotted_keys_and_arrays_of_tables():
    text = '[a."b c"]\nx.y = 1\n  [[s]]\n  use = "u"\n[s.t]\n[[s]]\n[a]\n'
    assert key_positions(text) == {
        ("a",): (7, 2),
        ("a", "b c"): (1, 4),
        ("a", "b c", "x"): (2, 1),
        ("a", "b c", "x", "y"): (2, 3),
        ("s",): (3, 5),
        ("s", 0): (3, 5),
        ("s", 0, "use"): (4, 3),
        ("s", 0, "t"): (5, 4),
        ("s", 1): (6, 3),
    }


def test_strings_with_everything_that_looks_like_something_else():
    text = 'a = """\nb = 1 # ""\n[c]""""\nd = \'\'\'\n]\'\'\'\'\ne = "\\"#"\nf = 1979-05-27 07:32:00 # g = 1\n'
    assert key_positions(text) == {("a",): (1, 1), ("d",): (4, 1), ("e",): (6, 1), ("f",): (7, 1)}


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_quotes_before_the_closing_quotes(quote, count):
    text = f"a = {quote * 3}x\n{quote * count}\nb = [{quote * 3}{quote * count}, 1]\n"
    tomli.loads(text)
    assert key_positions(text)[("b", 1)] == (3, 11 + count)


def test_columns_count_characters():
    assert key_positions('a = {"é😀" = 1, b = [1, [2]]}')[("a", "b", 1, 0)] == (1, 25)


def test_a_key_of_an_option():
    assert parse_key(' a . "b=c"  =1') == (("a", "b=c"), 12)
    with pytest.raises(ScanError):
        parse_key("=1")
