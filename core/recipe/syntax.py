"""TOML text to values, with tomli's syntax errors in plain words and at the most useful place."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import tomli

from regraft.core.errors import Problem, RecipeError
from regraft.core.recipe.positions import Lines, Position, ScanError, Scanner
from regraft.core.recipe.wording import KeyPath, key_text, quoted

MAX_DEPTH = 64
"""Tables and arrays inside each other; deeper is refused, so that every later walk may recurse."""
_MAX_DIGITS = 4000
"""Python refuses to read longer decimal integers."""


class Reason(NamedTuple):
    """What is wrong, what to do about it, and how far before tomli's place it stands."""

    message: str
    remedy: str | None = None
    back: int = 0


_REASONS = {
    "Expected ']' at the end of a table declaration": Reason('expected "]" after the name of the table'),
    "Expected ']]' at the end of an array declaration": Reason(
        'expected "]]" after the name of the array of tables', "write [[steps]]"
    ),
    "Unclosed array": Reason('expected "," or "]" in the array'),
    "Unclosed inline table": Reason('expected "," or "}" in the inline table'),
    "Invalid date or datetime": Reason("there is no such date or time"),
    "Invalid hex value": Reason("expected hexadecimal digits after the escape \\x, \\u or \\U"),
    "Escaped character is not a Unicode scalar value": Reason("the escape names no Unicode character"),
    "Invalid initial character for a key part": Reason(
        "expected a key", "keys are made of letters, digits, - and _; put any other in quotes"
    ),
    "Invalid statement": Reason("expected a key, a [table] or a comment"),
    "Unescaped '\\' in a string": Reason(
        "unknown escape in a string", "put text with backslashes in single quotes, or double each backslash", back=2
    ),
}
_CLASHES = ("Cannot overwrite", "Cannot declare", "Cannot redefine", "Cannot mutate", "Duplicate inline table key")
_NEWLINE_IN_STRING = ("Illegal character '\\n'", "Found invalid character '\\n'")
_STRING_TO_THE_END = ("Unterminated string", 'Expected "\'"', "Expected \"'''\"")
_CLOSE = "end it with the quotes it began with"


def parse_toml(text: str, file: str) -> dict[str, Any]:
    """The values of a TOML text; `file` is what errors call it.

    Raises:
        RecipeError: the text is not TOML, with line and column.
    """
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise RecipeError([_problem(error, file)]) from None
    except RecursionError:
        raise RecipeError([Problem(f"tables and arrays go deeper than {MAX_DEPTH} levels", file=file)]) from None
    except ValueError:
        raise RecipeError([_long_integer(text, file)]) from None


def _problem(error: tomli.TOMLDecodeError, file: str) -> Problem:
    if error.msg.startswith(_CLASHES):
        clash = _clash(error)
        if clash is not None:
            path, position, message = clash
            return Problem(message, key_text(path), file, position.line, position.column, "keep one of them")
    reason, offset = _open_to_the_end(error), _last_statement(error.doc)
    if reason is None:
        reason = _reason(error)
        offset = error.pos - reason.back
    line, column = Lines(error.doc).position(offset)
    return Problem(reason.message, "", file, line, column, reason.remedy)


def _reason(error: tomli.TOMLDecodeError) -> Reason:
    message, rest = error.msg, error.doc[error.pos :]
    if message == "Invalid statement" and rest == error.doc.lstrip() and rest.startswith("{"):
        return Reason("expected TOML, found what looks like JSON", "a recipe is TOML: [tables] and key = value lines")
    if message in _REASONS:
        return _REASONS[message]
    if message in _NEWLINE_IN_STRING:
        return Reason("a string is not closed on this line", f"{_CLOSE}; text over several lines needs triple quotes")
    if message == "Invalid value":
        return _no_value(rest)
    if message == "Expected '=' after a key in a key/value pair":
        return Reason('expected "=" after the key', "TOML writes key = value" if rest.startswith(":") else None)
    if message == "Expected newline or end of document after a statement":
        found = quoted(_line(rest).strip())
        return Reason(f"unexpected {found} after the value", "text needs quotes; each key needs its own line")
    if message.startswith(("Illegal character", "Found invalid character")):
        return Reason(f"the control character U+{ord(rest[0]):04X} is not allowed here", "delete it")
    if message.startswith("Duplicate inline table key"):
        key = message.removeprefix("Duplicate inline table key ").strip("'\"")
        return Reason(f"the key {quoted(key)} stands twice in an inline table", "keep one of them")
    return Reason(message[:1].lower() + message[1:])


def _open_to_the_end(error: tomli.TOMLDecodeError) -> Reason | None:
    """What the last statement begins and leaves open until the file ends; None where the fault is another."""
    text = error.doc[: error.pos].rstrip()
    if error.pos < len(error.doc.rstrip()):
        return None
    if error.msg in _STRING_TO_THE_END:
        return Reason("a string that begins in this line is never closed", _CLOSE)
    if error.msg == "Unclosed array" or (error.msg == "Invalid value" and text.endswith(("[", ","))):
        return Reason("an array that begins in this line is never closed", 'end it with "]"')
    key_expected = error.msg.startswith("Invalid initial character") and text.endswith(("{", ","))
    if error.msg == "Unclosed inline table" or key_expected:
        return Reason("an inline table that begins in this line is never closed", 'end it with "}"')
    return None


def _last_statement(text: str) -> int:
    """The offset of the first statement that cannot be walked to its end."""
    scanner = Scanner(text)
    start = 0
    try:
        while scanner.statement() is not None:
            start = scanner.pos
    except (ScanError, tomli.TOMLDecodeError):
        pass
    return len(text) - len(text[start:].lstrip())


def _no_value(rest: str) -> Reason:
    token = _line(rest).strip(" \t,]}")
    if not token:
        return Reason('expected a value after "="')
    if token in ("True", "False"):
        return Reason(f"expected a value, found {token}", f"write {token.lower()}")
    if token.casefold() in ("null", "none", "nil"):
        return Reason(f"expected a value, found {token}", "TOML has no null: leave the key out")
    return Reason(f"expected a value, found {token}", f"put text in quotes: {quoted(token)}")


def _line(rest: str) -> str:
    """What stands on the rest of the line, without a comment."""
    return re.split(r"[\n#]", rest, maxsplit=1)[0]


def _clash(error: tomli.TOMLDecodeError) -> tuple[KeyPath, Position, str] | None:
    """The key that clashes with an earlier one: its path, its place, and what it clashes with.

    tomli reports where it noticed; the scanner walks the same statements up to there, and the last one is to blame.
    """
    scanner = Scanner(error.doc)
    seen: dict[KeyPath, Position] = {}
    try:
        while (found := scanner.statement()) is not None:
            path, position = found
            if scanner.pos >= error.pos:
                break
            for length in range(len(path), 0, -1):
                seen.setdefault(path[:length], position)
        else:
            return None
    except (ScanError, tomli.TOMLDecodeError):
        return None
    if path in seen:
        return path, position, f"already set in line {seen[path].line}"
    for length in range(len(path) - 1, 0, -1):
        if first := seen.get(path[:length]):
            return path, position, f"{key_text(path[:length])} is already set in line {first.line}"
    return None


def _long_integer(text: str, file: str) -> Problem:
    """Python's own limit on reading integers is the only ValueError that tomli lets through."""
    digits = re.search(rf"[0-9_]{{{_MAX_DIGITS},}}", text.replace("\r\n", "\n"))
    line, column = Lines(text.replace("\r\n", "\n")).position(digits.start()) if digits else (None, None)
    return Problem("the integer is too long", "", file, line, column, "integers have at most 64 bits")
