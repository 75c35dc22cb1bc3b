"""JSON as checkpoints use it: bounded, with clear errors, and changed by merge patches (RFC 7396)."""

from __future__ import annotations

import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.core.buffers import unreadable
from regraft.core.errors import InputError

MAX_JSON_BYTES = 128 << 20
"""No honest config, index or tokenizer comes near; what does is refused before it is parsed, which takes up to 30 times
the size."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_REMEDY = "correct the file, or fetch it again"


def parse_object(data: bytes, where: object, *, remedy: str = _REMEDY) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        InputError: as `parse_json`, or not an object.
    """
    document = parse_json(data, where, remedy=remedy)
    if not isinstance(document, dict):
        raise InputError(
            "is not a JSON object", where=where, expected="an object", found=type(document).__name__, remedy=remedy
        )
    return document


def parse_json(data: bytes, where: object, *, remedy: str = _REMEDY) -> Any:
    """What `data` is as JSON.

    Raises:
        InputError: too large, not UTF-8, not JSON, half a surrogate pair, or a key given twice.
    """
    check_size(len(data), where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise InputError("a key is given twice", where=where, found=brief(twice), remedy=remedy)
        return result

    try:
        text = data.decode("utf-8")
        document = json.loads(text, object_pairs_hook=unique)
        check_surrogates(text, document)
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where=where, found=error.reason, remedy=remedy) from None
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise InputError("has half a surrogate pair", where=where, found=half, remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        raise InputError("is not JSON", where=where, found=error, remedy=remedy) from None
    return document


def check_surrogates(text: str, value: Any) -> None:
    """Refuse half a surrogate pair, which JSON can spell and nothing can encode.

    Args:
        text: of the document, in which such a value must be spelt as an escape.
        value: what was read from it.

    Raises:
        UnicodeEncodeError: there is one.
    """
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode("utf-8")


def brief(value: object) -> str:
    """A value out of an untrusted file, short enough for a message and without control characters."""
    shown = reprlib.Repr()
    shown.maxstring = 120
    return shown.repr(value)


def check_size(nbytes: int, where: object) -> None:
    """Refuse JSON that is too large before it is read.

    Raises:
        InputError: it is.
    """
    if nbytes > MAX_JSON_BYTES:
        raise InputError(
            "is too large for JSON that a checkpoint holds",
            where=where,
            expected=f"at most {MAX_JSON_BYTES} bytes",
            found=f"{nbytes} bytes",
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        InputError: it cannot be read, or `parse_object` refuses it.
    """
    try:
        check_size(path.stat().st_size, path)
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    return parse_object(data, path)


def dump(document: Mapping[str, Any]) -> bytes:
    """The bytes under which regraft writes a JSON object: two spaces of indent, a newline at the end."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def merge(document: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`document` changed by a merge patch: objects merge, null removes, anything else replaces (RFC 7396)."""
    result = dict(document)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            below = result.get(key)
            result[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch that turns `before` into `after`, where `after` holds no null (a merge patch cannot set one)."""
    patch: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            if inner := difference(old, value):
                patch[key] = inner
        elif key not in before or not same(old, value):
            patch[key] = value
    return patch


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values are written alike, but for the order of keys: 1, 1.0 and true are three values."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
