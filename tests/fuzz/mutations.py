"""Hostile variants of honest bytes: changed as JSON, as a safetensors header, as lines of text, or byte by byte.

Who chooses is the caller's: `pick` takes one of a list. hypothesis chooses by what it draws, atheris by its coverage.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Pick = Callable[[Sequence[Any]], Any]

HUGE = 10**400
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 64, 2**31, 2**53, 2**63, 2**64, HUGE, -HUGE, 0.0, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), "", "a", "0", "1e999", "\0", "../../etc/passwd", "/etc/passwd", "\ud800", "é" * 300,
    "F32", "BF16", "I64", "[[", "(", "(a+)+$", "*", "LORA", "BPE", "<unk>", [], [[]], [0], [None], ["a", "a"], {},
    {"a": 0}, {"": {}}, [1, 2, 3], [[0, 0], [0, 0]], [[[[[[]]]]]],
)  # fmt: skip
"""What stands in fields where nobody expects it."""
WORDS = (
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b'"', b"'", b",", b"\t", b"=", b"[", b"]", b"{", b"}",
    b"[[", b"-1", b"0", b"1e999", b"nan", b"inf", b"9" * 30, b"9" * 5000, b"true", b"null", b"../", b"/dev/null",
    b"\\u0000", b"\\ud800", "\u2028".encode(), "é".encode(), b" " * 100, b"#", b"'''", b'"""', b"1979-05-27T07:32:00Z",
)  # fmt: skip
"""What stands in texts where nobody expects it."""


def mutated_json(data: bytes, pick: Pick) -> bytes:
    """A value of the document replaced, removed, given twice, moved or wrapped; other bytes if it is no JSON."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutated_bytes(data, pick)
    places = list(_places(document))
    if not places:
        return _dumped(pick(VALUES))
    container, key = pick(places)
    match pick(("value", "value", "value", "other", "remove", "key", "twice", "wrap", "number", "bytes")):
        case "value":
            container[key] = pick(VALUES)
        case "other":
            source, at = pick(places)
            container[key] = json.loads(_dumped(source[at]))
        case "remove":
            del container[key]
        case "key" if isinstance(container, dict):
            container[str(pick((*VALUES, *(at for _, at in places))))[:400]] = container.pop(key)
        case "twice" if isinstance(container, list):
            container.insert(key, container[key])
        case "wrap":
            container[key] = pick(([container[key]], {"a": container[key]}))
        case "number" if isinstance(container[key], int | float):
            container[key] = pick((container[key] + 1, container[key] - 1, -container[key], container[key] * 2))
        case "bytes":
            return mutated_bytes(data, pick)
    return _dumped(document)


def mutated_lines(data: bytes, pick: Pick) -> bytes:
    """One line changed as JSON, or the lines as text."""
    if pick((False, False, True)):
        return mutated_text(data, pick)
    lines = data.split(b"\n")
    at = pick(range(len(lines)))
    lines[at] = mutated_json(lines[at], pick)
    return b"\n".join(lines)


def mutated_safetensors(data: bytes, pick: Pick) -> bytes:
    """The header changed as JSON and its length made right again, or any bytes of the file changed."""
    length = int.from_bytes(data[:8], "little")
    if 8 + length > len(data) or pick((False, False, False, True)):
        return mutated_bytes(data, pick)
    header = mutated_json(data[8 : 8 + length], pick)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def mutated_text(data: bytes, pick: Pick) -> bytes:
    """A line removed, doubled or moved, or words of `WORDS` put in or in place of others."""
    lines = data.split(b"\n")
    at = pick(range(len(lines)))
    match pick(("remove", "double", "swap", "word", "word", "word", "bytes")):
        case "remove":
            del lines[at]
        case "double":
            lines.insert(at, lines[at])
        case "swap":
            other = pick(range(len(lines)))
            lines[at], lines[other] = lines[other], lines[at]
        case "word":
            begin = pick(range(len(lines[at]) + 1))
            end = min(len(lines[at]), begin + pick((0, 0, 1, 2, 8)))
            lines[at] = lines[at][:begin] + pick(WORDS) + lines[at][end:]
        case "bytes":
            return mutated_bytes(data, pick)
    return b"\n".join(lines)


def mutated_bytes(data: bytes, pick: Pick) -> bytes:
    """Bytes cut off, set to extremes, put in, or repeated."""
    begin = pick(range(len(data) + 1))
    width = pick((1, 2, 4, 8))
    match pick(("cut", "extreme", "extreme", "insert", "repeat", "copy")):
        case "cut":
            return data[:begin]
        case "extreme":
            value: bytes = pick(
                (b"\0" * width, b"\xff" * width, b"\xff" * (width - 1) + b"\x7f", b"\1" + b"\0" * (width - 1))
            )
            return data[:begin] + value + data[begin + width :]
        case "insert":
            word: bytes = pick(WORDS)
            return data[:begin] + word + data[begin:]
        case "repeat":
            return data[:begin] + data[begin : begin + 4 * width] * 3 + data[begin:]
    source = pick(range(len(data) + 1))
    return data[:begin] + data[source : source + width] + data[begin + width :]


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Every value of a document, as container and key."""
    stack = [document]
    while stack:
        container = stack.pop()
        if isinstance(container, dict | list):
            keys: list[Any] = list(container) if isinstance(container, dict) else list(range(len(container)))
            yield from ((container, key) for key in keys)
            stack += [container[key] for key in keys]


def _dumped(document: Any) -> bytes:
    return json.dumps(document).encode()
