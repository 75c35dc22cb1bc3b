"""The header of a safetensors file: read, validated before anything is trusted, written.

The format: 8 bytes of little-endian header length, that many bytes of JSON, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft.core.errors import InputError
from regraft.core.specs import ITEM_BYTES, TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""The bound of the reference implementation; the largest published headers have a few megabytes."""

_MAX_ELEMENTS = 1 << 60
_ALIGNMENT = 8
_REDOWNLOAD = "the file is damaged or incomplete: fetch it again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: its spec and where its bytes begin, counted from the start of the file."""

    spec: TensorSpec
    offset: int


@dataclass(frozen=True)
class Header:
    """A validated header: entries in the order of their bytes, metadata, where the data begins, and the file's size."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_offset: int
    file_bytes: int


def read_header(path: Path) -> Header:
    """Read and validate the header of `path`; of the tensors' bytes nothing is read.

    Raises:
        InputError: the file cannot be read, or its header lies; the message says which rule it breaks.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            text = file.read(length)
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=path, remedy="check the path and its rights"
        ) from None
    return parse_header(path, text, size)


def parse_header(path: Path, text: bytes, file_bytes: int) -> Header:
    """Validate the JSON `text` of a header against the size of its file.

    Raises:
        InputError: bad JSON, an unknown dtype, a shape that contradicts its byte range, a range outside the file,
            overlapping tensors, or holes between them.
    """
    document = _json_object(path, text)
    metadata = _metadata(path, document.pop("__metadata__", {}))
    data_offset = 8 + len(text)
    entries = sorted((_entry(path, name, item, data_offset) for name, item in document.items()), key=_position)
    _check_coverage(path, entries, data_offset, file_bytes)
    return Header({entry.spec.name: entry for entry in entries}, metadata, data_offset, file_bytes)


def render_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds `specs` in this order: length, JSON, spaces up to a multiple of 8."""
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        end = offset + spec.nbytes
        document[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise InputError(
            "is too short for a safetensors file",
            where=path,
            expected="at least 8 bytes",
            found=f"{size} bytes",
            remedy=_REDOWNLOAD,
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        remedy = "it is not a safetensors file, or it is damaged: fetch it again"
        raise InputError(
            "the header is too large",
            where=path,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{length} bytes",
            remedy=remedy,
        )
    if 8 + length > size:
        raise InputError(
            "is truncated inside its header",
            where=path,
            expected=f"{8 + length} bytes or more",
            found=f"{size} bytes",
            remedy=_REDOWNLOAD,
        )
    return length


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique(path))
    except UnicodeDecodeError:
        raise InputError("the header is not UTF-8", where=path, remedy=_REDOWNLOAD) from None
    except (ValueError, RecursionError) as error:
        raise InputError("the header is not JSON", where=path, found=error, remedy=_REDOWNLOAD) from None
    if not isinstance(document, dict):
        raise InputError(
            "the header is not a JSON object",
            where=path,
            expected="an object of tensors",
            found=type(document).__name__,
            remedy=_REDOWNLOAD,
        )
    return document


def _unique(path: Path) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise InputError("the header names something twice", where=path, found=key, remedy=_REDOWNLOAD)
            result[key] = value
        return result

    return pairs


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    raise InputError(
        "the metadata of the header is not a map of strings",
        where=f"{path}: __metadata__",
        expected="an object of strings",
        found=type(value).__name__,
        remedy=_REDOWNLOAD,
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_ELEMENTS


def _entry(path: Path, name: str, item: Any, data_offset: int) -> Entry:
    where = f"{path}: {name}"

    def fault(message: str, expected: object, found: object) -> InputError:
        return InputError(message, where=where, expected=expected, found=found, remedy=_REDOWNLOAD)

    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        found = sorted(item) if isinstance(item, dict) else type(item).__name__
        raise fault("the header's entry is malformed", "dtype, shape and data_offsets", found)
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise fault("unknown dtype", f"one of {', '.join(ITEM_BYTES)}", dtype)
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise fault("the shape is malformed", "a list of sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise fault("the byte range is malformed", "[begin, end]", offsets)
    spec = TensorSpec(name, dtype, tuple(shape))
    if spec.numel >= _MAX_ELEMENTS:
        raise fault("the shape is impossibly large", f"fewer than 2^60 elements of {dtype}", shape)
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise fault("shape and byte range disagree", f"{spec.nbytes} bytes for {dtype} {shape}", f"{end - begin} bytes")
    return Entry(spec, data_offset + begin)


def _position(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.spec.nbytes


def _check_coverage(path: Path, entries: list[Entry], data_offset: int, file_bytes: int) -> None:
    expected = data_offset
    for entry in entries:
        if entry.offset != expected:
            fault = "overlaps the tensor before it" if entry.offset < expected else "leaves a hole before it"
            raise InputError(
                fault,
                where=f"{path}: {entry.spec.name}",
                expected=f"data at byte {expected}",
                found=f"byte {entry.offset}",
                remedy=_REDOWNLOAD,
            )
        expected = entry.offset + entry.spec.nbytes
    if expected != file_bytes:
        fault = "is truncated" if expected > file_bytes else "has bytes that no tensor owns"
        raise InputError(
            fault, where=path, expected=f"{expected} bytes", found=f"{file_bytes} bytes", remedy=_REDOWNLOAD
        )
