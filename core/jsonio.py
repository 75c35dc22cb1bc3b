"""JSON as checkpoints use it: bounded, with clear errors, and changed by merge patches (RFC 7396)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.core.errors import InputError

MAX_JSON_BYTES = 256 << 20
"""No honest config, index or tokenizer comes near; what does is refused before it is parsed."""


def parse_object(data: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        InputError: too large, not UTF-8, not JSON, a key given twice, or not an object.
    """
    if len(data) > MAX_JSON_BYTES:
        raise InputError(
            "the file is too large", where=where, expected=f"at most {MAX_JSON_BYTES} bytes", found=len(data)
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError("a key is given twice", where=where, found=twice, remedy="keep one of them")
        return result

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise InputError("is not UTF-8 text", where=where, remedy="fetch the file again") from None
    except (ValueError, RecursionError) as error:
        raise InputError("is not JSON", where=where, found=error, remedy="correct the file or fetch it again") from None
    if not isinstance(document, dict):
        raise InputError(
            "is not a JSON object",
            where=where,
            expected="an object",
            found=type(document).__name__,
            remedy="correct the file or fetch it again",
        )
    return document


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        InputError: it cannot be read, or `parse_object` refuses it.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(
                "the file is too large",
                where=path,
                expected=f"at most {MAX_JSON_BYTES} bytes",
                found=f"{path.stat().st_size} bytes",
            )
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=path, remedy="check the path and its rights"
        ) from None
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
    """The merge patch that turns `before` into `after` (which may not contain null where `before` has a value)."""
    patch: dict[str, Any] = {key: None for key in before if key not in after}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            if inner := difference(old, value):
                patch[key] = inner
        elif key not in before or type(old) is not type(value) or old != value:
            patch[key] = value
    return patch
