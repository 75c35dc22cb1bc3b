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

from regraft.core.buffers import unreadable
from regraft.core.errors import InputError, PluginError
from regraft.core.jsonio import brief, parse_object
from regraft.core.specs import ITEM_BYTES, TensorSpec

MAX_HEADER_BYTES = 100_000_000
"""The bound of the reference implementation; the largest published headers have a few megabytes."""

_MAX_ELEMENTS = 1 << 60
_ALIGNMENT = 8
_METADATA = "__metadata__"
_POINTER = b"version "
"""How the small text files begin that a clone without Git LFS has in place of weights."""

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
        raise unreadable(path, error) from None
    return parse_header(path, text, size)


def parse_header(path: Path, text: bytes, file_bytes: int) -> Header:
    """Validate the JSON `text` of a header against the size of its file.

    Raises:
        InputError: bad JSON, an unknown dtype, a shape that contradicts its byte range, a range outside the file,
            overlapping tensors, or holes between them.
    """
    document = parse_object(text, f"{path}: header", remedy=_REDOWNLOAD)
    metadata = _metadata(path, document.pop(_METADATA, {}))
    data_offset = 8 + len(text)
    entries = sorted((_entry(path, name, item, data_offset) for name, item in document.items()), key=_position)
    _check_coverage(path, entries, data_offset, file_bytes)
    return Header({entry.spec.name: entry for entry in entries}, metadata, data_offset, file_bytes)


def render_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds `specs` in this order: length, JSON, spaces up to a multiple of 8.

    Raises:
        PluginError: two tensors of one name, or one with the name that the format keeps for metadata.
    """
    entries = {_METADATA: render_entry(_METADATA, dict(metadata))} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.name in entries or spec.name == _METADATA:
            raise PluginError("a file cannot hold a tensor of this name, or holds one already", where=spec.name)
        entries[spec.name] = render_tensor(spec, offset)
        offset += spec.nbytes
    text = b"{" + b",".join(entries.values()) + b"}"
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def render_tensor(spec: TensorSpec, begin: int) -> bytes:
    """The entry of one tensor whose bytes begin at `begin`, counted from the end of the header."""
    offsets = [begin, begin + spec.nbytes]
    return render_entry(spec.name, {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets})


def render_entry(name: str, value: Mapping[str, Any]) -> bytes:
    """One entry of a header, as few bytes as JSON allows."""
    name_text = json.dumps(name, ensure_ascii=False)
    return f"{name_text}:{json.dumps(value, separators=(',', ':'), ensure_ascii=False)}".encode()


def _fault(message: str, where: object, expected: object, found: object) -> InputError:
    return InputError(message, where=where, expected=expected, found=found, remedy=_REDOWNLOAD)


def _place(path: Path, name: str) -> str:
    return f"{path}: {name if name.isprintable() and len(name) < 200 else brief(name)}"


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise _fault("is too short for a safetensors file", path, "at least 8 bytes", f"{size} bytes")
    if prefix == _POINTER:
        raise InputError(
            "is a Git LFS pointer, not the file that it stands for",
            where=path,
            expected="a safetensors file",
            found=f"{size} bytes of text",
            remedy="run `git lfs pull` in its folder, or fetch the file again",
        )
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise InputError(
            "the header is too large",
            where=path,
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{length} bytes",
            remedy="it is not a safetensors file, or it is damaged: fetch it again",
        )
    if 8 + length > size:
        raise _fault("is truncated inside its header", path, f"{8 + length} bytes or more", f"{size} bytes")
    return length


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and all(isinstance(item, str) for item in value.values()):
        return value
    where = _place(path, _METADATA)
    raise _fault("the metadata of the header is not a map of strings", where, "an object of strings", brief(value))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_ELEMENTS


def _overflows(shape: list[int]) -> bool:
    """Whether the product of the sizes passes the bound on the way, as the reference implementation counts it: a zero
    later in the list is no excuse, and a shape of a million sizes is given up early.
    """
    numel = 1
    for size in shape:
        numel *= size
        if numel >= _MAX_ELEMENTS:
            return True
    return False


def _entry(path: Path, name: str, item: Any, data_offset: int) -> Entry:
    where = _place(path, name)
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise _fault("the header's entry is malformed", where, "dtype, shape and data_offsets", brief(item))
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _fault("unknown dtype", where, f"one of {', '.join(ITEM_BYTES)}", brief(dtype))
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise _fault("the shape is malformed", where, "a list of sizes", brief(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _fault("the byte range is malformed", where, "[begin, end]", brief(offsets))
    if _overflows(shape):
        raise _fault("the shape is impossibly large", where, f"fewer than 2^60 elements of {dtype}", brief(shape))
    spec, (begin, end) = TensorSpec(name, dtype, tuple(shape)), offsets
    if end - begin != spec.nbytes:
        expected = f"{spec.nbytes} bytes for {dtype} {brief(shape)}"
        raise _fault("shape and byte range disagree", where, expected, f"{end - begin} bytes")
    return Entry(spec, data_offset + begin)


def _position(entry: Entry) -> tuple[int, int]:
    return entry.offset, entry.spec.nbytes


def _check_coverage(path: Path, entries: list[Entry], data_offset: int, file_bytes: int) -> None:
    expected = data_offset
    for entry in entries:
        if entry.offset != expected:
            message = "overlaps the tensor before it" if entry.offset < expected else "leaves a hole before it"
            where = _place(path, entry.spec.name)
            raise _fault(message, where, f"data at byte {expected}", f"byte {entry.offset}")
        expected = entry.offset + entry.spec.nbytes
    if expected != file_bytes:
        message = "is truncated" if expected > file_bytes else "has bytes that no tensor owns"
        raise _fault(message, path, f"{expected} bytes", f"{file_bytes} bytes")
