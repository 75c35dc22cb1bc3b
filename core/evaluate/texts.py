"""Texts to read with a model: their tokens, windows over them, and the blocks in which results are counted.

A block is a stretch of characters, so it is the same for two models whose tokenizers differ: results pair by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.examples import IGNORED, Example, ints
from regraft.core.data.rows import BadRows, Place
from regraft.core.errors import InputError, UsageError
from regraft.core.transformation import Params

if TYPE_CHECKING:
    from regraft.core.evaluate.metric import Measuring
    from regraft.core.loaded import Loaded

Count = Annotated[int, Field(ge=1)]


class TextParams(Params):
    """Texts, and how they are read."""

    data: tuple[str, ...] = Field(
        description="Text files, data files with a text column, or folders of them, with commas between them."
    )
    column: str | None = Field(None, description="The column with the text. Default: found by its name.")
    unit: Literal["file", "paragraph", "line"] = Field("file", description="What one text of a .txt or .md file is.")
    window: int | None = Field(None, ge=2, description="Tokens that are read at once. Default: the model's window.")
    stride: int | None = Field(
        None, ge=1, description="New tokens of a window; the others are context. Default: all are new."
    )
    block: Count = Field(1000, description="Characters of a block: what the bootstrap draws.")
    max_texts: Count | None = Field(None, description="Only the first so many texts.")

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.window is not None and self.stride is not None and self.stride >= self.window:
            raise ValueError("stride is less than window: lower it, or leave it out")
        return self


@dataclass(frozen=True)
class Text:
    """A text and its tokens.

    Args:
        name: where it stands.
        ids: [T] tokens, without any that the tokenizer would add.
        blocks: [T] the block that each token begins in.
        sizes: [T] UTF-8 bytes of each token; together those of the text.
    """

    name: str
    ids: Sequence[int]
    blocks: Sequence[int]
    sizes: Sequence[int]

    def key(self, token: int) -> str:
        """The name of the block that a token counts in."""
        return f"{self.name}#{self.blocks[token]}"


@dataclass(frozen=True)
class Window:
    """Tokens that are read at once.

    Args:
        example: the sequence; tokens of the text that count have labels.
        first: the number in the text of the first token that counts.
        count: how many do, one after the other, at the end of the sequence.
    """

    example: Example
    first: int
    count: int


def check_texts(params: TextParams) -> None:
    """Whether the data is there.

    Raises:
        UsageError: a path that leads nowhere.
    """
    from regraft.core.data.load import files_of

    for source in params.data:
        files_of(source)


def read_texts(params: TextParams, tokenizer: Any) -> list[Text]:
    """The texts and their tokens.

    Raises:
        InputError: they cannot be read, or there is no text.
        UsageError: no column fits.
    """
    found = [
        _text(tokenizer, text, str(place), params.block)
        for text, place in islice(raw_texts(params.data, params.column, params.unit), params.max_texts)
    ]
    if not any(len(text.ids) for text in found):
        raise InputError("the data has no text", where=", ".join(params.data), remedy="give another file")
    return found


def raw_texts(
    sources: Sequence[str], column: str | None, unit: Literal["file", "paragraph", "line"]
) -> Iterator[tuple[str, Place]]:
    """Texts as they stand, each with its place.

    Raises:
        InputError, UsageError: as `read_texts`.
    """
    from regraft.core.data.load import read_rows
    from regraft.core.data.records import Columns, find_columns
    from regraft.core.data.records import Text as TextRecord
    from regraft.core.data.settings import DataSettings

    for source in sources:
        columns: Columns | None = None
        settings = DataSettings(source=source, text_unit=unit)
        given = {"text": column} if column is not None else {}
        for row in read_rows(source, settings, BadRows()):
            columns = columns or find_columns(row.values, where=row.place, kind="text", given=given)
            try:
                record = columns.record(row)
            except InputError as error:
                error.where = str(row.place)
                raise
            assert isinstance(record, TextRecord)
            yield record.text, row.place


def window_of(subject: Loaded, wish: int | None, measuring: Measuring) -> int:
    """Tokens to read at once: what the task says, else what both models are meant for.

    Raises:
        UsageError: the model names no window, and the user none.
    """
    window = wish or measuring.window or subject.window
    if window is None:
        raise UsageError(
            "the model's config names no window",
            where=subject.checkpoint.label,
            remedy="give one, such as --task \"perplexity:held-out.txt window=1024\"",
        )  # fmt: skip
    return window


def start_token(tokenizer: Any) -> int | None:
    """What stands before a window, so that its first token can count: the begin token, else the end token."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return None if start is None else int(start)


def windows(text: Text, *, size: int, stride: int | None, start: int | None) -> Iterator[Window]:
    """Windows that count each token of a text once, but for the first of a text where there is no start token.

    Args:
        text: with at least one token.
        size: tokens of a window, the start token included.
        stride: new tokens of every window but the first, the others are context; None: all are new, but for one without
            a start token.
        start: of every window.
    """
    prefix = [] if start is None else [start]
    room = size - len(prefix)
    step = min(stride or room, room if prefix else room - 1)
    place = Place(text.name, 1)
    done = 0
    while done < len(text.ids):
        stop = min(len(text.ids), done + step if done else room)
        begin = max(0, stop - room) if stride else max(0, done - 1 + len(prefix))
        ids = [*prefix, *text.ids[begin:stop]]
        first = max(done, 1 - len(prefix))
        count = stop - first
        labels = [IGNORED] * (len(ids) - count) + ids[len(ids) - count :]
        done = stop
        if count > 0:
            yield Window(Example(ints(ids), ints(labels), place), first, count)


def _text(tokenizer: Any, text: str, name: str, block: int) -> Text:
    import numpy

    fast = bool(getattr(tokenizer, "is_fast", False))
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    ids = list(coded["input_ids"])
    if not fast:  # it does not tell where its tokens stand: the text is one block
        sizes = [0] * len(ids)
        sizes[-1:] = [len(text.encode())] * min(1, len(ids))
        return Text(name, ids, [0] * len(ids), sizes)
    starts = [start for start, _ in coded["offset_mapping"]]
    points = numpy.frombuffer(text.encode("utf-32-le"), dtype=numpy.uint32)
    widths = 1 + (points > 0x7F).astype(int) + (points > 0x7FF) + (points > 0xFFFF)
    before = numpy.concatenate([[0], widths.cumsum()])
    edges = [0, *starts[1:], len(text)] if ids else []
    sizes = [int(before[stop] - before[start]) for start, stop in pairwise(edges)]
    return Text(name, ids, [start // block for start in starts], sizes)
