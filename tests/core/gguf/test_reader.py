"""The header parser: what it reads, and a corpus of files that lie."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.errors import InputError
from regraft.core.gguf import cursor
from regraft.core.gguf.reader import read_header
from tests.core.gguf.binary import ARRAY, BOOL, F32, Q8_0, STRING, U8, U32, Binary, array, entry, pair, text, u32
from tests.core.gguf.writing import write_model
from tests.families import tiny

HUGE = 1 << 62
ARCHITECTURE = pair("general.architecture", STRING, text("llama"))

MALFORMED = {
    "empty": (b"", "truncated", "the magic"),
    "another format": (b"PK\x03\x04" + bytes(60), "not a GGUF file", "PK"),
    "version 1": (Binary(version=u32(1)), "version", "1"),
    "version from the future": (Binary(version=u32(4)), "version", "4"),
    "big-endian": (Binary(version=struct.pack(">I", 3)), "big-endian", None),
    "cut in the counts": (bytes(Binary())[:12], "truncated", None),
    "cut in a key": (bytes(Binary())[:38], "truncated", None),
    "cut in the entries": (bytes(Binary())[:130], "truncated", None),
    "cut in the data": (bytes(Binary())[:-1], "ends before the tensor does", None),
    "more pairs than bytes": (Binary(pair_count=HUGE), "more metadata than the file can hold", str(HUGE)),
    "more tensors than bytes": (Binary(tensor_count=HUGE), "more tensors than the file can hold", str(HUGE)),
    "string longer than the file": (Binary(pairs=[pair("k", STRING, struct.pack("<Q", HUGE))]), "truncated", None),
    "array longer than the file": (Binary(pairs=[pair("k", ARRAY, array(U32, HUGE))]), "more elements of k", str(HUGE)),
    "strings longer than the file": (
        Binary(pairs=[pair("k", ARRAY, array(STRING, HUGE))]),
        "more elements of k",
        str(HUGE),
    ),
    "string in an array longer than the file": (
        Binary(pairs=[pair("k", ARRAY, array(STRING, 2, text("x") + struct.pack("<Q", HUGE)))]),
        "truncated",
        None,
    ),
    "nested array": (Binary(pairs=[pair("k", ARRAY, array(ARRAY, 1, array(U8, 0)))]), "metadata type", "9"),
    "unknown metadata type": (Binary(pairs=[pair("k", 77, b"")]), "metadata type", "77"),
    "truth value 7": (Binary(pairs=[pair("k", BOOL, b"\x07")]), "no truth value", None),
    "key given twice": (Binary(pairs=[ARCHITECTURE, ARCHITECTURE]), "twice", "general.architecture"),
    "key not UTF-8": (Binary(pairs=[pair(b"\xff\xfe", U32, u32(1))]), "not UTF-8", None),
    "key of control characters": (Binary(pairs=[pair("a\x1b[2J", U32, u32(1))]), "no name", "a\\x1b[2J"),
    "key without end": (Binary(pairs=[pair("k" * 300, U32, u32(1))]), "no name", None),
    "tensor without a name": (Binary(entries=[entry("", (8, 2), F32, 0)]), "no name", "''"),
    "value not UTF-8": (Binary(pairs=[pair("k", STRING, text(b"\xff"))]), "not UTF-8", None),
    "token not UTF-8": (
        Binary(pairs=[pair("k", ARRAY, array(STRING, 2, text("x") + text(b"\xff")))]),
        "not UTF-8",
        "element 1",
    ),
    "alignment 0": (Binary(pairs=[pair("general.alignment", U32, u32(0))]), "general.alignment", "0"),
    "alignment 48": (Binary(pairs=[pair("general.alignment", U32, u32(48))]), "general.alignment", "48"),
    "alignment text": (Binary(pairs=[pair("general.alignment", STRING, text("32"))]), "general.alignment", "32"),
    "no dimensions": (Binary(entries=[entry("a", (), F32, 0)]), "number of dimensions", "0"),
    "five dimensions": (Binary(entries=[entry("a", (1,) * 5, F32, 0)]), "number of dimensions", "5"),
    "a billion dimensions": (
        Binary(entries=[entry("a", (1,), F32, 0, dimensions=10**9)]),
        "number of dimensions",
        None,
    ),
    "dimension 0": (Binary(entries=[entry("a", (8, 0), F32, 0)]), "impossible shape", "[0, 8]"),
    "shape that overflows": (Binary(entries=[entry("a", (1 << 40, 1 << 40), F32, 0)]), "impossible shape", None),
    "unknown encoding": (Binary(entries=[entry("a", (8, 2), 9999, 0)]), "encoding", "type number 9999"),
    "removed encoding": (Binary(entries=[entry("a", (32, 2), 4, 0)]), "encoding", "type number 4"),
    "block that does not fit": (Binary(entries=[entry("a", (33, 1), Q8_0, 0)]), "does not fit the encoding", "[1, 33]"),
    "packed vector": (Binary(entries=[entry("a", (32,), Q8_0, 0)]), "does not fit the encoding", "[32]"),
    "unaligned": (Binary(entries=[entry("a", (8, 2), F32, 4)]), "not aligned", "offset 4"),
    "offset beyond the end": (Binary(entries=[entry("a", (8, 2), F32, 1 << 40)]), "ends before the tensor does", None),
    "overlap": (Binary(entries=[entry("a", (8, 2), F32, 0), entry("b", (32, 1), Q8_0, 32)]), "overlaps", None),
    "tensor twice": (Binary(entries=[entry("a", (8, 1), F32, 0), entry("a", (8, 1), F32, 32)]), "twice", None),
    "tensor larger than the file": (
        Binary(entries=[entry("a", (1 << 20, 1 << 20), F32, 0)]),
        "ends before the tensor does",
        None,
    ),
}


def test_well_formed(tmp_path):
    header = read_header(Binary().write(tmp_path))
    assert header.metadata == {"general.architecture": "llama"}
    a, b = header.tensors["a"], header.tensors["b"]
    assert (a.shape, a.type_name, a.nbytes, a.row_bytes) == ((2, 8), "F32", 64, 32)
    assert (b.shape, b.type_name, b.nbytes, b.row_bytes) == ((1, 32), "Q8_0", 34, 34)
    assert b.offset + b.nbytes == header.file_bytes
    assert a.offset % 32 == 0


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name, tmp_path):
    content, message, found = MALFORMED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(bytes(content))
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert message in caught.value.message or message in caught.value.where
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    if found is not None:
        assert found in f"{caught.value.message} {caught.value.found}"


def test_version_2_and_another_alignment_are_read(tmp_path):
    pairs = [pair("general.alignment", U32, u32(64))]
    entries = [entry("a", (8, 2), F32, 0), entry("b", (32, 1), Q8_0, 64)]
    header = read_header(Binary(version=u32(2), pairs=pairs, entries=entries, alignment=64).write(tmp_path))
    assert header.version == 2
    assert header.tensors["a"].offset % 64 == 0


def test_all_metadata_types(tmp_path):
    codes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
    pairs = [pair(f"k{kind}", kind, struct.pack("<" + code, 3)) for kind, code in codes.items()]
    pairs += [
        pair("flags", ARRAY, array(BOOL, 3, b"\1\0\1")),
        pair("flag", BOOL, b"\1"),
        pair("none", ARRAY, array(STRING, 0)),
    ]
    pairs += [pair("numbers", ARRAY, array(U32, 2, struct.pack("<2I", 5, 6)))]
    metadata = read_header(Binary(pairs=pairs).write(tmp_path)).metadata
    assert {metadata[f"k{kind}"] for kind in codes} == {3}
    assert metadata["flags"] == [True, False, True]
    assert metadata["flag"] is True
    assert metadata["none"] == []
    assert metadata["numbers"] == [5, 6]


def test_strings_across_window_borders(tmp_path, monkeypatch):
    monkeypatch.setattr(cursor, "_WINDOW_BYTES", 64)
    tokens = ["x" * length for length in (0, 1, 55, 56, 57, 200, 3, 64, 128)] * 5
    pairs = [pair("tokens", ARRAY, array(STRING, len(tokens), b"".join(map(text, tokens)))), ARCHITECTURE]
    metadata = read_header(Binary(pairs=pairs).write(tmp_path)).metadata
    assert metadata["tokens"] == tokens
    assert metadata["general.architecture"] == "llama"


def test_header_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(cursor, "MAX_HEADER_BYTES", 1000)
    monkeypatch.setattr(cursor, "_WINDOW_BYTES", 64)
    big = Binary(pairs=[pair("k", STRING, text("x" * 2000))])
    with pytest.raises(InputError, match="too large"):
        read_header(big.write(tmp_path))
    array_of_bytes = Binary(pairs=[pair("k", ARRAY, array(U8, 2000, bytes(2000)))])
    with pytest.raises(InputError, match="more elements of k"):
        read_header(array_of_bytes.write(tmp_path))


def test_same_as_the_reference_reader(tmp_path):
    import gguf

    path = write_model(tmp_path / "model.gguf", tiny("qwen3"), "Q8_0")
    theirs, ours = gguf.GGUFReader(path), read_header(path)
    assert {
        name: value
        for name, field in theirs.fields.items()
        if not name.startswith("GGUF.")
        for value in [field.contents()]
    } == ours.metadata
    assert {t.name: (tuple(t.shape[::-1]), t.tensor_type.name, t.data_offset, t.n_bytes) for t in theirs.tensors} == {
        t.name: (t.shape, t.type_name, t.offset, t.nbytes) for t in ours.tensors.values()
    }


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_header(tmp_path / "none.gguf")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_byte_never_escapes_as_another_error(tmp_path_factory, data):
    content = bytearray(bytes(Binary()))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        header = read_header(path)
        assert all(tensor.offset + tensor.nbytes <= len(content) for tensor in header.tensors.values())
