"""Rows out of data files: JSON lines, JSON, CSV, Parquet, plain text, and what the `datasets` library opens."""

from __future__ import annotations

import codecs
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from regraft.core.buffers import unreadable
from regraft.core.data.rows import BadRows, Place, Row
from regraft.core.errors import InputError, UsageError
from regraft.core.jsonio import brief, check_surrogates

TextUnit = Literal["file", "paragraph", "line"]
Reader = Callable[[Path, str, BadRows], Iterator[Row]]

TEXT = "text"
"""The column of plain text files."""

_READ_BYTES = 1 << 20
_LINE_BEGINS = re.compile(r"\n(?=\S)")
"""The end of a line before one that is not indented."""


def read_file(
    path: Path, label: str, bad: BadRows, *, text_unit: TextUnit = "file", piece_characters: int | None = None
) -> Iterator[Row]:
    """The rows of one file; the suffix says its format, and an unknown one is plain text only if it is `.txt` or `.md`.

    Args:
        path: the file.
        label: how messages name it.
        bad: gets the rows that cannot be read.
        text_unit: what one row of a plain text is.
        piece_characters: a plain text that is one row, and longer, comes in rows of at least so many characters that
            end before a line that is not indented, and is not held as a whole. None gives one row.

    Raises:
        InputError: the file cannot be read, or too many rows are bad.
        UsageError: no reader for the suffix, or the reader needs a library that is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return _guarded(_text(path, label, text_unit, piece_characters), path)
    if suffix not in READERS:
        raise UsageError(
            "no reader for files of this kind",
            where=label,
            expected=", ".join([*READERS, *TEXT_SUFFIXES]),
            found=suffix or "no suffix",
            remedy="convert or rename the file",
        )
    return _guarded(READERS[suffix](path, label, bad), path)


def _guarded(rows: Iterator[Row], path: Path) -> Iterator[Row]:
    try:
        yield from rows
    except OSError as error:
        raise unreadable(path, error) from None


def _json_lines(path: Path, label: str, bad: BadRows) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            place = Place(label, number)
            values = _parsed(text, place, bad)
            if isinstance(values, Mapping):
                yield Row(values, place)
            elif values is not None:
                bad.add(place, f"is not a JSON object, found {type(values).__name__}")


def _parsed(text: bytes, place: Place, bad: BadRows) -> Any:
    """The JSON value; None, and a bad row, if it is none."""
    try:
        decoded = text.decode("utf-8")
        value = json.loads(decoded)
        check_surrogates(decoded, value)
    except UnicodeEncodeError as error:
        bad.add(place, f"has half a surrogate pair, {error.object[error.start]!a}")
    except UnicodeDecodeError as error:
        bad.add(place, f"is not UTF-8 text ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        bad.add(place, f"is not JSON ({error})")
    else:
        if value is not None:
            return value
        bad.add(place, "is null")
    return None


def _json(path: Path, label: str, bad: BadRows) -> Iterator[Row]:
    remedy = "correct the file, or give one object a line as .jsonl"
    try:
        text = path.read_bytes().decode("utf-8-sig")
        items = json.loads(text)
        check_surrogates(text, items)
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise InputError("has half a surrogate pair", where=label, found=half, remedy=remedy) from None
    except (ValueError, RecursionError) as error:
        raise InputError("is not JSON", where=label, found=error, remedy=remedy) from None
    if not isinstance(items, list):
        raise InputError(
            "is not a list of rows", where=label, expected="[{...}, ...]", found=type(items).__name__, remedy=remedy
        )
    for number, values in enumerate(items, start=1):
        place = Place(label, number, "row")
        if isinstance(values, Mapping):
            yield Row(values, place)
        else:
            bad.add(place, f"is not an object, found {brief(values)}")


def _separated(delimiter: str) -> Reader:
    def read(path: Path, label: str, bad: BadRows) -> Iterator[Row]:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                yield from _csv_rows(csv.reader(file, delimiter=delimiter, strict=True), label, bad)
        finally:
            csv.field_size_limit(limit)

    return read


def _csv_rows(lines: Any, label: str, bad: BadRows) -> Iterator[Row]:
    header: list[str] | None = None
    while True:
        place = Place(label, lines.line_num + 1)
        try:
            fields = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            bad.add(place, f"is not CSV ({error})")
            continue
        if not fields:
            continue
        if header is None:
            header = _checked_header(fields, place)
        elif reason := _fields_fault(fields, header):
            bad.add(place, reason)
        else:
            yield Row(dict(zip(header, fields, strict=True)), place)


def _checked_header(fields: list[str], place: Place) -> list[str]:
    header = [name.strip() for name in fields]
    if len(set(header)) < len(header) or "" in header:
        raise InputError(
            "the first line does not name the columns",
            where=place,
            expected="names, each different",
            found=brief(", ".join(header)),
            remedy="add a header line",
        )
    return header


def _fields_fault(fields: list[str], header: list[str]) -> str:
    if len(fields) != len(header):
        return f"has {len(fields)} fields where the header has {len(header)}"
    if any("\udc80" <= char <= "\udcff" for text in fields for char in text if not text.isascii()):
        return "is not UTF-8 text"
    return ""


def _parquet(path: Path, label: str, bad: BadRows) -> Iterator[Row]:
    del bad
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            "reading Parquet needs pyarrow, which is not installed",
            where=label,
            remedy="pip install 'regraft[parquet]', or convert the file to .jsonl",
        ) from None
    try:
        number = 0
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, Place(label, number, "row"))
    except (pyarrow.ArrowException, ValueError, OverflowError, TypeError, KeyError) as error:  # pyarrow raises them all
        raise InputError("is not a Parquet file that pyarrow reads", where=label, found=error) from None


def _text(path: Path, label: str, unit: TextUnit, piece_characters: int | None) -> Iterator[Row]:
    decoded = _decoded(path, label)
    if unit == "file":
        units = _long_pieces(decoded, piece_characters) if piece_characters else iter([(1, "".join(decoded))])
    else:
        units = _pieces(_lines(decoded), unit)
    for number, piece in units:
        if piece.strip():
            yield Row({TEXT: piece}, Place(label, number))


def _decoded(path: Path, label: str) -> Iterator[str]:
    """The text in the pieces in which it is read."""
    decoder, read = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with path.open("rb") as file:
        while True:
            data = file.read(_READ_BYTES)
            read += len(data)
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                found = f"{error.reason} at byte {read - len(error.object) + error.start}"
                raise InputError("is not UTF-8 text", where=label, found=found, remedy="convert the file") from None
            if not data:
                return


def _long_pieces(decoded: Iterable[str], least: int) -> Iterator[tuple[int, str]]:
    """First line and text of each piece of at least so many characters, the last one apart."""
    number, size, limit = 1, 0, least
    waiting: list[str] = []
    for more in decoded:
        waiting.append(more)
        size += len(more)
        if size <= limit:
            continue
        held = "".join(waiting)
        while found := _LINE_BEGINS.search(held, max(least, len(held) - len(held.lstrip()))):  # no piece is blank
            yield number, held[: found.end()]
            number += held.count("\n", 0, found.end())
            held = held[found.end() :]
        waiting, size = [held], len(held)
        limit = least if size <= least else 2 * size  # no end of a line: not to be searched again with every read
    yield number, "".join(waiting)


def _lines(decoded: Iterable[str]) -> Iterator[str]:
    """Lines with their ends, as `str.splitlines` finds them in the whole text."""
    held = ""
    for more in decoded:
        if lines := (held + more).splitlines(keepends=True):
            yield from lines[:-1]
            held = lines[-1]  # perhaps a carriage return whose line feed is still to be read
    if held:
        yield held


def _pieces(lines: Iterable[str], unit: TextUnit) -> Iterator[tuple[int, str]]:
    """First line and text of each line or paragraph; line ends stay inside a piece and go at its end."""
    if unit == "line":
        yield from ((number, line.rstrip("\r\n")) for number, line in enumerate(lines, start=1))
        return
    paragraph: list[str] = []
    for number, line in enumerate(chain(lines, [""]), start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield number - len(paragraph), "".join(paragraph).rstrip("\r\n")
            paragraph = []


def read_datasets(source: str, label: str, *, split: str, subset: str | None = None) -> Iterator[Row]:
    """The rows of a folder that `Dataset.save_to_disk` wrote, or of a dataset on the hub.

    Raises:
        UsageError: `datasets` is not installed, or there is no such split.
        InputError: it cannot open the data.
    """
    try:
        import datasets
    except ImportError:
        raise UsageError(
            "reading this needs the `datasets` library, which is not installed",
            where=label,
            remedy="pip install 'regraft[datasets]', or give a .jsonl, .csv or .txt file",
        ) from None
    folder = Path(source).is_dir()
    try:
        opened: Any = datasets.load_from_disk(source) if folder else datasets.load_dataset(source, subset, split=split)
    except Exception as error:
        raise InputError(
            "the `datasets` library cannot open it", where=label, found=f"{type(error).__name__}: {error}",
            remedy="check the name, the split and the subset",
        ) from None  # fmt: skip
    if isinstance(opened, Mapping):
        if split not in opened:
            raise UsageError("has no such split", where=label, expected=", ".join(opened), found=split)
        opened = opened[split]
    return _numbered(opened, label)


def _numbered(rows: Iterable[Mapping[str, Any]], label: str) -> Iterator[Row]:
    for number, values in enumerate(rows, start=1):
        yield Row(dict(values), Place(label, number, "row"))


TEXT_SUFFIXES = (".txt", ".md")
READERS: Mapping[str, Reader] = MappingProxyType(
    {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": _separated(","),
        ".tsv": _separated("\t"),
        ".parquet": _parquet,
    }
)
"""Reader by suffix."""
