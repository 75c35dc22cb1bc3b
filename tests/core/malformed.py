"""Checkpoints that lie, each broken in one way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoints import INDEX, SINGLE, entry, file_bytes

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DATA = bytes(32)
GOOD = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}


@dataclass(frozen=True)
class Case:
    """A broken checkpoint: how it is written into a folder, the file to blame, and words of the message."""

    name: str
    write: Callable[[Path], None]
    file: str
    words: str


def file_cases() -> Iterator[Case]:
    """Single safetensors files that break a rule of the format."""
    for name, content, words in _files():
        yield Case(name, _single(content), SINGLE, words)


def folder_cases() -> Iterator[Case]:
    """Folders whose parts are missing or contradict each other."""
    yield from _config_cases()
    yield from _weight_cases()
    yield from _index_cases()


def _single(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / SINGLE).write_bytes(content)

    return write


def _files() -> Iterator[tuple[str, bytes, str]]:
    whole = file_bytes(GOOD, DATA)
    end = len(whole) - len(DATA)
    for place, size in {
        "at nothing": 0,
        "in the length": 7,
        "after the length": 8,
        "inside the header": end - 5,
        "after the header": end,
        "inside the first tensor": end + 10,
        "between tensors": end + 24,
        "before the last byte": end + 31,
    }.items():
        yield f"truncated {place}", whole[:size], "truncated|too short"
    yield "bytes after the last tensor", whole + b"!", "no tensor owns"
    yield from _prefixes(whole)
    yield from _texts()
    yield from _entries()
    yield from _ranges()
    yield "a pickle called safetensors", b"\x80\x04\x95" + bytes(64), "truncated"
    yield "a zip archive called safetensors", b"PK\x03\x04" + bytes(64), "too large|truncated"
    yield "a web page called safetensors", b"<!DOCTYPE html><html>" + b" " * 64, "too large"
    yield (
        "a pointer of git-lfs",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "Git LFS pointer",
    )


def _prefixes(whole: bytes) -> Iterator[tuple[str, bytes, str]]:
    length = int.from_bytes(whole[:8], "little")
    for name, value, words in (
        ("length of 2^64 - 1", 2**64 - 1, "too large"),
        ("length of 2^63", 2**63, "too large"),
        ("length one over the bound", 100_000_001, "too large"),
        ("length at the bound of a small file", 100_000_000, "truncated inside its header"),
        ("length of the file", len(whole), "truncated inside its header"),
        ("length one too short", length - 1, "not JSON"),
        ("length one too long", length + 1, "not JSON"),
        ("length of zero", 0, "not JSON"),
    ):
        yield name, value.to_bytes(8, "little") + whole[8:], words


def _texts() -> Iterator[tuple[str, bytes, str]]:
    good = json.dumps(GOOD["b"]).encode()
    for name, text, words in (
        ("header not UTF-8", b'{"\xff":0}', "not UTF-8"),
        ("header not JSON", b"{a: 1}", "not JSON"),
        ("header cut with a zero byte", b'{"a":{}\0}', "not JSON"),
        ("header with a byte order mark", b"\xef\xbb\xbf{}", "not JSON"),
        ("header is a list", b"[]", "not a JSON object"),
        ("header is null", b"null", "not a JSON object"),
        ("header is a string", b'"header"', "not a JSON object"),
        ("header nested 100000 deep", b'{"a":' * 100_000, "not JSON"),
        ("header with lists 100000 deep", b'{"a":' + b"[" * 100_000, "not JSON"),
        ("header with a number of 10000 digits", b'{"a":' + b"9" * 10_000 + b"}", "not JSON"),
        ("a tensor twice", b'{"b":' + good + b',"b":' + good + b"}", "twice"),
        ("a key of a tensor twice", b'{"b":{"dtype":"U8","dtype":"I8","shape":[8],"data_offsets":[0,8]}}', "twice"),
        ("a name with half a surrogate pair", b'{"\\ud800":' + good + b"}", "surrogate"),
        ("metadata not an object", b'{"__metadata__":"pt","b":' + good + b"}", "map of strings"),
        ("metadata with a number", b'{"__metadata__":{"format":1}}', "map of strings"),
        ("metadata with an object", b'{"__metadata__":{"format":{}}}', "map of strings"),
    ):
        yield name, file_bytes(text, bytes(8)), words


def _entries() -> Iterator[tuple[str, bytes, str]]:
    nan, inf = float("nan"), float("inf")
    shapes: dict[str, Any] = {
        "is a number": 6, "is missing a list": None, "is an object": {"0": 6}, "has a negative size": [-6],
        "has a float size": [6.0], "has a size of NaN": [nan], "has an infinite size": [inf], "has a true size": [True],
        "has a string size": ["6"], "has a null size": [None], "has a size past 2^60": [2**60],
        "has a size of 2^64": [2**64 + 6], "is nested": [[6]],
    }  # fmt: skip
    for name, shape in shapes.items():
        yield f"shape {name}", _one(shape=shape), "shape is malformed"
    for name, shape in {
        "overflows": [2**32, 2**32],
        "overflows to its own size": [2**32, 2**32, 6],
        "overflows before a zero": [2**59, 2**59, 0],
        "has very many sizes": [3] * 200_000,
    }.items():
        yield f"shape {name}", _one(shape=shape), "impossibly large"
    ranges: dict[str, Any] = {
        "is a number": 0, "is empty": [], "has one end": [0], "has three ends": [0, 24, 24], "is negative": [-24, 0],
        "has float ends": [0.0, 24.0], "has an end of NaN": [0, nan], "has a true end": [False, True],
        "has string ends": ["0", "24"], "ends past 2^60": [0, 2**60],
    }  # fmt: skip
    for name, offsets in ranges.items():
        yield f"range {name}", _one(data_offsets=offsets), "byte range is malformed"
    for name, dtype in {"unknown": "F31", "in small letters": "f32", "a number": 32, "null": None}.items():
        yield f"dtype {name}", _one(dtype=dtype), "unknown dtype"
    yield "dtype a list", _one(dtype=["F32"]), "unknown dtype"
    yield "an entry is a list", file_bytes({"a": ["F32", [2, 3], [0, 24]]}, bytes(24)), "entry is malformed"
    yield "an entry without dtype", file_bytes({"a": {"shape": [], "data_offsets": [0, 0]}}), "entry is malformed"
    yield "an entry without range", file_bytes({"a": {"dtype": "F32", "shape": []}}), "entry is malformed"
    yield "an entry with another key", _one(strides=[3, 1]), "entry is malformed"


def _one(**changes: Any) -> bytes:
    return file_bytes({"a": {**GOOD["a"], **changes}}, bytes(24))


def _ranges() -> Iterator[tuple[str, bytes, str]]:
    first = GOOD["a"]
    for name, header, words in (
        ("a range longer than its shape", {"a": entry("F32", [2, 3], 0, 32)}, "disagree"),
        ("a range shorter than its shape", {"a": entry("F32", [3], 0, 8), "b": entry("U8", [24], 8, 32)}, "disagree"),
        ("a range that runs backwards", {"a": entry("F32", [2, 3], 24, 0)}, "disagree"),
        ("a range behind the end", {"a": entry("U8", [32], 0, 32), "b": entry("U8", [4096], 32, 4128)}, "truncated"),
        ("a hole before the first tensor", {"a": entry("F32", [2, 3], 8, 32)}, "hole"),
        ("a hole between tensors", {"a": first, "b": entry("U8", [4], 28, 32)}, "hole"),
        ("two tensors in one place", {"a": entry("U8", [32], 0, 32), "b": entry("U8", [32], 0, 32)}, "overlaps"),
        ("two tensors that overlap", {"a": first, "b": entry("U8", [16], 16, 32)}, "overlaps"),
        ("an empty tensor inside another", {"a": entry("U8", [32], 0, 32), "b": entry("U8", [0], 8, 8)}, "overlaps"),
        ("data that no tensor owns", {"a": first}, "no tensor owns"),
        ("data without tensors", {}, "no tensor owns"),
    ):  # fmt: skip
        yield name, file_bytes(header, DATA), words


def _config_cases() -> Iterator[Case]:
    weights = file_bytes(GOOD, DATA)

    def config(name: str, content: bytes | None, words: str) -> Case:
        def write(folder: Path) -> None:
            (folder / SINGLE).write_bytes(weights)
            if content is not None:
                (folder / "config.json").write_bytes(content)

        return Case(f"config {name}", write, "config.json", words)

    yield config("missing", None, "no config.json")
    yield config("empty", b"", "not JSON")
    yield config("not JSON", b"model_type: llama", "not JSON")
    yield config("not UTF-8", b'{"model_type":"\xe9"}', "not UTF-8")
    yield config("with a key twice", b'{"hidden_size":8,"hidden_size":16}', "twice")
    yield config("with a key twice in a part", b'{"text_config":{"a":1,"a":1}}', "twice")
    yield config("a list", b"[{}]", "not a JSON object")
    yield config("null", b"null", "not a JSON object")
    yield config("nested 100000 deep", b'{"a":' * 100_000, "not JSON")
    yield config("with half a surrogate pair", b'{"a":"\\uDC00"}', "surrogate")

    def too_large(folder: Path) -> None:
        (folder / SINGLE).write_bytes(weights)
        (folder / "config.json").touch()
        os.truncate(folder / "config.json", 1 << 40)

    yield Case("config of a terabyte", too_large, "config.json", "too large")


def _weight_cases() -> Iterator[Case]:
    def files(name: str, contents: dict[str, bytes], file: str, words: str) -> Case:
        def write(folder: Path) -> None:
            for path, content in {"config.json": b"{}", **contents}.items():
                (folder / path).write_bytes(content)

        return Case(name, write, file, words)

    weights = file_bytes(GOOD, DATA)
    yield files("no weights", {}, SINGLE, "no weights")
    yield files("pickled weights", {"pytorch_model.bin": b"\x80\x04"}, "pytorch_model.bin", "never reads pickles")
    yield files("pickled weights of lightning", {"last.ckpt": b"\x80\x04"}, "last.ckpt", "never reads pickles")
    yield files("weights under another name", {"weights.safetensors": weights}, "weights.safetensors", "no weights")
    yield files("both single and sharded", {SINGLE: weights, INDEX: b"{}"}, INDEX, "holds both")

    def a_folder(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / SINGLE).mkdir()

    yield Case("weights that are a folder", a_folder, SINGLE, "no weights")


def _index_cases() -> Iterator[Case]:
    good = {"a": ONE, "b": TWO}

    def index(
        name: str, document: Any, words: str, *, file: str = INDEX, shards: tuple[bytes, bytes] = _SHARDS
    ) -> Case:
        def write(folder: Path) -> None:
            (folder / "config.json").write_text("{}")
            for path, content in zip((ONE, TWO), shards, strict=True):
                (folder / path).write_bytes(content)
            (folder / INDEX).write_bytes(document if isinstance(document, bytes) else json.dumps(document).encode())

        return Case(f"index {name}", write, file, words)

    def mapped(name: str, changes: dict[str, Any], words: str, file: str = INDEX) -> Case:
        return index(name, {"weight_map": {**good, **changes}}, words, file=file)

    yield index("empty", b"", "not JSON")
    yield index("not JSON", b"{", "not JSON")
    yield index("a list", [], "not a JSON object")
    yield index("without weight_map", {"metadata": {}}, "no weight_map")
    yield index("with an empty weight_map", {"weight_map": {}}, "no weight_map")
    yield index("whose weight_map is a list", {"weight_map": [ONE, TWO]}, "no weight_map")
    yield index("with a tensor twice", b'{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}', "twice")
    yield index("with weight_map twice", b'{"weight_map":{},"weight_map":{"a":"x"}}', "twice")
    for kind, value in {"number": 1, "null": None, "list": [ONE], "object": {}, "truth value": True}.items():
        yield mapped(f"that maps to a {kind}", {"b": value}, "does not name a file")
    for kind, path in {
        "the folder above": f"../{TWO}",
        "a folder above and back": f"../checkpoint/{TWO}",
        "an absolute path": "/etc/passwd",
        "a folder below": f"sub/{TWO}",
        "a Windows path": f"..\\{TWO}",
        "a path with a zero byte": f"{TWO}\0.safetensors",
        "an empty name": "",
        "the folder itself": ".",
        "the parent": "..",
        "a name that ends in a slash": f"{TWO}/",
    }.items():
        yield mapped(f"that names {kind}", {"b": path}, "does not name a file")
    yield mapped("that names a missing shard", {"c": "model-00003-of-00003.safetensors"}, "missing")
    yield mapped("that names a pickle", {"c": "pytorch_model.bin"}, "never reads pickles", "pytorch_model.bin")
    yield mapped("that names a tensor of no shard", {"c": TWO}, "disagree")
    yield mapped("that swaps shards", {"a": TWO, "b": ONE}, "disagree")
    lacking = {"weight_map": {"a": ONE, "b": TWO}}
    extra = file_bytes({"b": entry("U8", [4], 0, 4), "c": entry("U8", [4], 4, 8)}, bytes(8))
    yield index("that forgets a tensor", lacking, "does not name", shards=(_SHARDS[0], extra))
    yield index("of shards with one tensor twice", lacking, "same tensor", shards=(_SHARDS[0], _both()))
    yield index("of a truncated shard", lacking, "truncated", file=TWO, shards=(_SHARDS[0], _SHARDS[1][:-1]))
    yield index("of an empty shard", lacking, "too short", file=ONE, shards=(b"", _SHARDS[1]))


_SHARDS = (file_bytes({"a": entry("U8", [4], 0, 4)}, bytes(4)), file_bytes({"b": entry("U8", [4], 0, 4)}, bytes(4)))


def _both() -> bytes:
    return file_bytes({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 4, 8)}, bytes(8))
