"""Prompts as token ids: from rows of data, or from the recipe's own texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from regraft.core.checkpoint import FileRef
from regraft.core.data.chat import chat_text
from regraft.core.data.load import files_of, read_rows
from regraft.core.data.names import distinct_names
from regraft.core.data.records import COLUMNS, Chat, Columns, Completion, Record, Text, find_columns
from regraft.core.data.rows import BadRows, Place, Row
from regraft.core.errors import InputError, UsageError
from regraft.plugins.steer.params import PromptSettings


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one kind.

    Args:
        ids: token ids of each, at least one.
        rows: that were read.
        bad: rows that were skipped.
        files: SHA-256 by the name of each file.
    """

    ids: Sequence[Sequence[int]]
    rows: int
    bad: int = 0
    files: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """For a patch's metrics: no path."""
        text = ";".join(",".join(map(str, prompt)) for prompt in self.ids)
        return {
            "prompts": len(self.ids),
            "rows": self.rows,
            "bad_rows": self.bad,
            "tokens": sum(map(len, self.ids)),
            "digest": hashlib.sha256(text.encode()).hexdigest(),
            "files": dict(sorted(self.files.items())),
        }


def read_prompts(settings: PromptSettings, tokenizer: Any, *, key: str, window: int, seed: int) -> PromptSet:
    """The prompts that `settings` names, tokenised.

    Args:
        settings: of the recipe.
        tokenizer: of the checkpoint.
        key: where they stand in the recipe, for messages.
        window: tokens that the model's positions allow.
        seed: of the draw that `max_rows` asks for.

    Raises:
        InputError: data cannot be read, too many rows are bad, or there is no prompt.
        UsageError: no reader or no column fits.
        Unsupported: the data has chats and the model no chat template.
    """
    bad, count, prompts = BadRows(settings.max_bad_rows), 0, list[list[int]]()
    most = min(window, settings.max_tokens or window)
    columns: Columns | None = None
    file = None
    for row in _rows(settings, key, bad):
        count += 1
        if columns is None or row.place.file != file:
            columns, file = _columns(row, settings), row.place.file
        try:
            prompts.append(_checked(_ids(tokenizer, columns.record(row)), most))
        except InputError as error:
            bad.add(row.place, error)
    if settings.max_rows is not None and len(prompts) > settings.max_rows:
        prompts = Random(seed).sample(prompts, settings.max_rows)
    if not prompts:
        raise InputError(
            "there are no prompts",
            where=", ".join(settings.sources) or key,
            expected="at least one",
            found=f"{count} rows, {len(bad.rows)} bad",
            remedy="give a prompt a line, or rows with a text or prompt column",
        )
    names = distinct_names(str(path) for source in settings.sources for path in files_of(source))
    files = {name: FileRef(path=Path(path)).sha256() for path, name in names.items()}
    return PromptSet(prompts, count, len(bad.rows), files)


def answer_ids(tokenizer: Any, answers: Sequence[str]) -> list[int]:
    """The token of each answer.

    Raises:
        UsageError: one is no single token, or two are the same.
    """
    found: dict[int, str] = {}
    for answer in answers:
        ids = tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(tokenizer.decode([one])) for one in ids) or "nothing"
            raise UsageError("an answer is no single token of this model", where="answers", expected="one token each",
                             found=f"{answer!r}, which is {pieces}", remedy="give the token that tells it")  # fmt: skip
        if ids[0] in found:
            raise UsageError("two answers are the same token", where="answers", expected="one token each",
                             found=f"{found[ids[0]]!r} and {answer!r}", remedy="leave one out")  # fmt: skip
        found[ids[0]] = answer
    return list(found)


def _rows(settings: PromptSettings, key: str, bad: BadRows) -> Iterator[Row]:
    for number, text in enumerate(settings.prompts, start=1):
        yield Row({"text": text}, Place(f"{key}.prompts", number, "prompt"))
    for source in settings.sources:
        yield from read_rows(source, settings, bad)


def _columns(row: Row, settings: PromptSettings) -> Columns:
    """Which column is the prompt; a prompt column without an answer beside it will do."""
    try:
        columns = find_columns(row.values, where=row.place, kind=settings.kind, given=settings.columns)
    except UsageError:
        alone = [name for name in row.values if name.lower() in COLUMNS["prompt"]]
        if settings.kind is not None or settings.columns or len(alone) != 1:
            raise
        return find_columns(row.values, where=row.place, kind="text", given={"text": alone[0]})
    if columns.kind == "preference":
        raise UsageError(
            "a pair of answers is not one prompt",
            where=row.place,
            expected="a text, a prompt, or a prompt with its completion",
            found="a preference pair",
            remedy='take one of them: kind = "completion", columns = { completion = "chosen" }',
        )
    return columns


def _ids(tokenizer: Any, record: Record) -> list[int]:
    if isinstance(record, Chat):
        asks = record.messages[-1]["role"] != "assistant"
        text, special = chat_text(tokenizer, record.messages, prompt=asks), False
    else:
        assert isinstance(record, (Text, Completion))
        text, special = record.text if isinstance(record, Text) else record.prompt + record.completion, True
    plain: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not special:
        return plain
    ids: list[int] = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return ids[:-1] if ids and ids[-1] == end and plain[-1:] != [end] else ids  # the prompt goes on: it has no end


def _checked(ids: list[int], most: int) -> list[int]:
    if not ids:
        raise InputError("the prompt has no tokens")
    if len(ids) > most:
        raise InputError(f"has {len(ids)} tokens", expected=f"at most {most}")
    return ids
