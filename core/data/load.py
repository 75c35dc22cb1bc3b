"""Training data from end to end: files, rows, records, tokens, sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from regraft.core.checkpoint import FileRef
from regraft.core.data.encode import Encoder
from regraft.core.data.examples import Example, PreferenceExample, digest
from regraft.core.data.lengths import Lengths, pack
from regraft.core.data.names import distinct_names
from regraft.core.data.readers import READERS, TEXT_SUFFIXES, TextUnit, read_datasets, read_file
from regraft.core.data.records import Columns, find_columns
from regraft.core.data.rows import BadRow, BadRows, Row
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError, UsageError
from regraft.core.file_patterns import is_pattern, matched

_DATASETS_MARKS = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass(frozen=True)
class Dataset:
    """Sequences to train on, and what became of the rows.

    Args:
        examples: all of one kind, in the order of the data or, with `max_rows`, of the draw.
        counts: rows read, sequences truncated, split, dropped, tokens, tokens learnt, tokens left over by packing.
        bad: the rows that were skipped.
        files: SHA-256 by the name of each file that was read.
    """

    examples: Sequence[Example | PreferenceExample]
    counts: Mapping[str, int]
    bad: tuple[BadRow, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of what the sequences teach."""
        return digest(self.examples)

    def summary(self) -> dict[str, Any]:
        """For a patch's metrics: digest, counts, SHA-256 by the name of each file; no path."""
        names = distinct_names(self.files)
        files = {names[path]: sha256 for path, sha256 in sorted(self.files.items())}
        return {"digest": self.digest, **self.counts, "files": files}


def check_sources(settings: DataSettings) -> None:
    """Whether the files that `settings` names are there; for `Transformation.check`, reads none of them.

    Raises:
        UsageError: a path that leads nowhere, or a folder without data.
    """
    for source in settings.sources:
        files_of(source)


def load_data(settings: DataSettings, tokenizer: Any, *, window: int, seed: int = 0) -> Dataset:
    """Read and tokenise what `settings` names.

    Args:
        settings: of the step.
        tokenizer: of the checkpoint.
        window: tokens the model's positions allow.
        seed: of the draw that `max_rows` asks for.

    Raises:
        InputError: data cannot be read, too many rows are bad, or nothing is left.
        UsageError: no reader or no column fits, or `max_tokens` exceeds the window.
        Unsupported: the data has chats and the model no chat template.
    """
    bad = BadRows(settings.max_bad_rows)
    rows = (row for source in settings.sources for row in read_rows(source, settings, bad))
    files = {str(path): _sha256(path) for source in settings.sources for path in files_of(source)}
    return prepare(rows, settings, tokenizer, window=window, seed=seed, bad=bad, files=files)


def prepare(
    rows: Iterable[Row],
    settings: DataSettings,
    tokenizer: Any,
    *,
    window: int,
    seed: int = 0,
    bad: BadRows | None = None,
    files: Mapping[str, str] | None = None,
) -> Dataset:
    """As `load_data`, from rows that are already there."""
    bad = bad if bad is not None else BadRows(settings.max_bad_rows)
    most = _most(settings, window)
    lengths = Lengths(None if settings.pack else most, settings.min_tokens, settings.too_long)
    counts = {"rows": 0}
    examples = list(_examples(rows, settings, Encoder(tokenizer, settings.learn, settings.end), lengths, bad, counts))
    if settings.pack:
        examples, counts["left_over_tokens"] = _packed(examples, settings, most)
    if settings.max_rows is not None and len(examples) > settings.max_rows:
        examples = Random(seed).sample(examples, settings.max_rows)
    if not examples:
        raise InputError(
            "the data gives nothing to train on",
            where=", ".join(settings.sources),
            expected="at least one sequence",
            found=f"{counts['rows']} rows, {len(bad.rows)} bad, {lengths.dropped} sequences dropped",
            remedy="give more data, or a smaller max_tokens where texts are packed",
        )
    counts |= {"sequences": len(examples), "bad_rows": len(bad.rows), "truncated": lengths.truncated}
    counts |= {"split": lengths.split, "dropped": lengths.dropped, **_tokens(examples)}
    return Dataset(examples, counts, tuple(bad.rows), files or {})


def read_rows(
    source: str, settings: DataSettings, bad: BadRows, *, piece_characters: int | None = None
) -> Iterator[Row]:
    """The rows of one source.

    Args:
        source: one of `settings.sources`.
        settings: how it is read.
        bad: gets the rows that cannot be read.
        piece_characters: as for `read_file`.

    Raises:
        InputError: it cannot be read.
        UsageError: there is no such file, or no reader for it.
    """
    files = files_of(source)
    if files:
        unit: TextUnit = settings.text_unit
        for path in files:
            yield from read_file(path, str(path), bad, text_unit=unit, piece_characters=piece_characters)
    else:
        yield from read_datasets(source, source, split=settings.split, subset=settings.subset)


def files_of(source: str) -> list[Path]:
    """The data files that a source means, in order; none for what the `datasets` library opens.

    Raises:
        UsageError: a path that leads nowhere, a folder without data, or a pattern that matches no data.
    """
    try:
        path = Path(source).expanduser()
        if path.is_file():
            return [path]
    except (OSError, RuntimeError) as error:  # a name too long for any file, no right to look, no such home
        raise UsageError("the path cannot be looked at", where=source[:200], found=error,
                         remedy="check the path of the data") from None  # fmt: skip
    if path.is_dir():
        if any((path / mark).is_file() for mark in _DATASETS_MARKS):
            return []
        return _data_files(path.iterdir(), source, "the folder has no data files")
    if is_pattern(source):
        return _data_files(matched(source).values(), source, "no data file matches the pattern")
    if source.count("/") > 1 or path.suffix.lower() in {*READERS, *TEXT_SUFFIXES} or source.startswith((".", "~", "/")):
        raise UsageError("there is no such file or folder", where=source, remedy="check the path of the data")
    return []


def _data_files(paths: Iterable[Path], source: str, none: str) -> list[Path]:
    suffixes = {*READERS, *TEXT_SUFFIXES}
    files = sorted(file for file in paths if file.is_file() and file.suffix.lower() in suffixes)
    if not files:
        raise UsageError(none, where=source, expected=", ".join(sorted(suffixes)), remedy="check the path of the data")
    return files


def _sha256(path: Path) -> str:
    return FileRef(path=path).sha256()


def _most(settings: DataSettings, window: int) -> int:
    if settings.max_tokens is not None and settings.max_tokens > window:
        raise UsageError(
            "sequences may not be longer than the model's window",
            where="max_tokens",
            expected=f"at most {window}",
            found=settings.max_tokens,
            remedy="lower it, or extend the context first with `use = \"context-extension\"`",
        )  # fmt: skip
    return settings.max_tokens or window


def _examples(
    rows: Iterable[Row],
    settings: DataSettings,
    encoder: Encoder,
    lengths: Lengths,
    bad: BadRows,
    counts: dict[str, int],
) -> Iterator[Example | PreferenceExample]:
    columns: Columns | None = None
    file, kinds = None, set[type]()
    for row in rows:
        counts["rows"] += 1
        if columns is None or row.place.file != file:
            columns = find_columns(row.values, where=row.place, kind=settings.kind, given=settings.columns)
            file = row.place.file
        try:
            for one in lengths.fit(encoder.encode(columns.record(row), row.place)):
                kinds.add(type(one))
                yield one
        except InputError as error:
            bad.add(row.place, error)
        if len(kinds) > 1:
            raise UsageError("preference pairs and other rows cannot be mixed", where=row.place, remedy="give one kind")


def _packed(
    examples: Sequence[Example | PreferenceExample], settings: DataSettings, most: int
) -> tuple[list[Example | PreferenceExample], int]:
    single = [example for example in examples if isinstance(example, Example)]
    if len(single) < len(examples):
        raise UsageError("preference pairs cannot be packed", where="pack", remedy="leave pack out")
    packed, left = pack(single, most, restart=settings.restart_positions)
    return list(packed), left


def _tokens(examples: Sequence[Example | PreferenceExample]) -> dict[str, int]:
    sequences = [
        one
        for example in examples
        for one in ((example,) if isinstance(example, Example) else (example.chosen, example.rejected))
    ]
    return {"tokens": sum(map(len, sequences)), "learnt_tokens": sum(one.learnt for one in sequences)}
