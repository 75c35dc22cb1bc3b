"""Where every key and every array element of a TOML text stands.

tomli gives positions for syntax errors only. This scanner runs after tomli has accepted the text, so it may rely on the
text being valid TOML 1.1 and only has to find its way: it records places and decodes nothing but keys.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import NamedTuple

import tomli

from regraft.core.recipe.wording import KeyPath


class Position(NamedTuple):
    """Line and column, in characters, both from 1."""

    line: int
    column: int


_SPACE = re.compile(r"[ \t]*")
_BLANK = re.compile(r"[ \t\n]*(?:#[^\n]*[ \t\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BASIC = r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
_LITERAL = r"'[^'\n]*'"
_QUOTED_KEY = re.compile(f"{_BASIC}|{_LITERAL}")
_SCALAR = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""(?:"{0,2})'  # up to two quotes may stand before the closing ones
    r"|'''[^']*(?:'(?!'')[^']*)*'''(?:'{0,2})"
    rf"|{_BASIC}|{_LITERAL}|[^,\]}}#\n]+",  # numbers, booleans, dates (which may hold a space)
    re.DOTALL,
)
"""No possessive quantifiers: around groups they match wrongly in Python 3.11.0 to 3.11.4. Nothing needs them here: a
text has one way to match each of these, or the rest cannot fail.
"""


class ScanError(ValueError):
    """The text is not valid TOML at this place; never raised for a text that tomli accepts."""


class Lines:
    """Turns offsets into a text (whose line ends are `\\n`) into positions."""

    def __init__(self, text: str) -> None:
        self._starts = [0, *(match.end() for match in re.finditer("\n", text))]

    def position(self, offset: int) -> Position:
        """The position of the character at `offset`."""
        line = bisect_right(self._starts, offset)
        return Position(line, offset - self._starts[line - 1] + 1)


def key_positions(text: str) -> dict[KeyPath, Position]:
    """The position of every key and array element of a TOML text that tomli accepts.

    A key stands where its own text begins, quotes included: in `[a.b]` and in `a.b = 1` both `a` and `b` have their
    places. A table that is also declared by its own header stands there; otherwise the first mention counts. An element
    of an array stands where its value begins; an element of an array of tables at the last key of its `[[header]]`.
    """
    scanner = Scanner(text)
    while scanner.statement() is not None:
        pass
    return scanner.positions


def parse_key(text: str) -> tuple[tuple[str, ...], int]:
    """The parts of the dotted key that `text` begins with, and the offset behind it and the space that follows.

    Raises:
        ScanError: it does not begin with a key.
    """
    scanner = Scanner(text)
    parts = scanner.key()
    return tuple(name for name, _ in parts), scanner.pos


class Scanner:
    """Walks a TOML text statement by statement; `positions` grows as it goes, `pos` is the offset reached."""

    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n")
        self.pos = 0
        self.positions: dict[KeyPath, Position] = {}
        self.lines = Lines(self.text)
        self._table: KeyPath = ()
        self._lengths: dict[KeyPath, int] = {}
        self._declared: set[KeyPath] = set()

    def statement(self) -> tuple[KeyPath, Position] | None:
        """Scan the next statement; the full path of the key it defines and where that key stands, None at the end.

        Raises:
            ScanError: the text is not valid TOML.
        """
        self._skip(_BLANK)
        if self.pos >= len(self.text):
            return None
        if self.text.startswith("[[", self.pos):
            return self._array_header()
        if self.text.startswith("[", self.pos):
            return self._table_header()
        return self._pair(self._table)

    def key(self) -> list[tuple[str, int]]:
        """The dotted key that stands here: its parts with their offsets."""
        parts = []
        while True:
            self._skip(_SPACE)
            parts.append((self._key_part(), self._start))
            self._skip(_SPACE)
            if not self.text.startswith(".", self.pos):
                return parts
            self.pos += 1

    def _key_part(self) -> str:
        self._start = self.pos
        if bare := self._skip(_BARE_KEY):
            return bare
        token = self._skip(_QUOTED_KEY)
        if not token:
            raise ScanError
        if token.startswith("'"):
            return token[1:-1]
        decoded: str = tomli.loads(f"key = {token}")["key"]
        return decoded

    def _table_header(self) -> tuple[KeyPath, Position]:
        self._expect("[")
        *parents, (name, offset) = self.key()
        self._expect("]")
        path = (*self._walk(parents), name)
        position = self.lines.position(offset)
        if path not in self._declared:
            self._declared.add(path)
            self.positions[path] = position
        self._table = path
        return path, position

    def _array_header(self) -> tuple[KeyPath, Position]:
        self._expect("[[")
        *parents, (name, offset) = self.key()
        self._expect("]]")
        array = (*self._walk(parents), name)
        position = self.lines.position(offset)
        self._note(array, offset)
        count = self._lengths.get(array, 0)
        self._lengths[array] = count + 1
        self._table = (*array, count)
        self._note(self._table, offset)
        return array, position

    def _walk(self, parts: list[tuple[str, int]]) -> KeyPath:
        """The path of the table that a header's leading parts name; an array of tables stands for its last element."""
        path: KeyPath = ()
        for name, offset in parts:
            path = (*path, name)
            self._note(path, offset)
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
        return path

    def _pair(self, table: KeyPath) -> tuple[KeyPath, Position]:
        path = table
        offset = self.pos
        for name, offset in self.key():
            path = (*path, name)
            self._note(path, offset)
        self._expect("=")
        self._skip(_SPACE)
        self._value(path)
        return path, self.lines.position(offset)

    def _value(self, path: KeyPath) -> None:
        if self.text.startswith("[", self.pos):
            self._array(path)
        elif self.text.startswith("{", self.pos):
            self._inline_table(path)
        elif not self._skip(_SCALAR):
            raise ScanError

    def _array(self, path: KeyPath) -> None:
        self._expect("[")
        index = 0
        while not self._closed("]"):
            element = (*path, index)
            self._note(element, self.pos)
            self._value(element)
            index += 1
            self._comma("]")

    def _inline_table(self, path: KeyPath) -> None:
        self._expect("{")
        while not self._closed("}"):
            self._pair(path)
            self._comma("}")

    def _closed(self, bracket: str) -> bool:
        self._skip(_BLANK)
        closed = self.text.startswith(bracket, self.pos)
        self.pos += closed
        return closed

    def _comma(self, bracket: str) -> None:
        self._skip(_BLANK)
        if not self.text.startswith(bracket, self.pos):
            self._expect(",")

    def _note(self, path: KeyPath, offset: int) -> None:
        self.positions.setdefault(path, self.lines.position(offset))

    def _expect(self, token: str) -> None:
        if not self.text.startswith(token, self.pos):
            raise ScanError
        self.pos += len(token)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.pos)
        if match is None:
            return ""
        self.pos = match.end()
        return match.group()
