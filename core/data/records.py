"""What a row means: a text, a prompt with its completion, a chat, or a preference between two answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from regraft.core.data.rows import Row
from regraft.core.errors import InputError, UsageError
from regraft.core.jsonio import brief

Kind = Literal["text", "completion", "chat", "preference"]
Message = Mapping[str, Any]

COLUMNS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "text": ("text", "content", "document", "story", "body"),
        "prompt": ("prompt", "question", "instruction", "query"),
        "completion": ("completion", "response", "answer", "output"),
        "messages": ("messages", "conversations", "conversation", "chat"),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
    }
)
"""Column names that are recognised for each role, upper or lower case alike."""

KINDS: Mapping[Kind, tuple[str, ...]] = MappingProxyType(
    {
        "preference": ("chosen", "rejected"),
        "chat": ("messages",),
        "completion": ("prompt", "completion"),
        "text": ("text",),
    }
)
"""The roles that make a kind, in the order in which kinds are tried."""

_SPEAKERS = MappingProxyType({"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"})
"""Roles as ShareGPT files write them; any other, such as `system`, stays."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token is learnt."""

    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt, and the answer that is learnt."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages with `role` and `content`; the assistant's, from index `first` on, are learnt."""

    messages: tuple[Message, ...]
    first: int = 0


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which the first is preferred."""

    chosen: Completion | Chat
    rejected: Completion | Chat


Record = Text | Completion | Chat | Preference


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of the data holds which role, and what kind of record they make."""

    kind: Kind
    names: Mapping[str, str]

    def record(self, row: Row) -> Record:
        """The record in a row.

        Raises:
            InputError: a value is missing or of another type.
        """
        values = {role: row.values.get(column) for role, column in self.names.items()}
        if self.kind == "text":
            return Text(_text(values["text"], self.names["text"]))
        if self.kind == "chat":
            return Chat(_messages(values["messages"], self.names["messages"]))
        prompt, column = values.get("prompt"), self.names.get("prompt", "prompt")
        if self.kind == "completion":
            return _answered(prompt, column, values["completion"], self.names["completion"])
        return Preference(
            _answered(prompt, column, values["chosen"], self.names["chosen"]),
            _answered(prompt, column, values["rejected"], self.names["rejected"]),
        )


def find_columns(
    available: Iterable[str], *, where: object, kind: Kind | None = None, given: Mapping[str, str] | None = None
) -> Columns:
    """The columns of a file: those the caller names, else those whose name says it (`COLUMNS`).

    Args:
        available: names of the columns in the data.
        where: how messages name the data.
        kind: what the records are; None tries preference, chat, completion, text, in this order.
        given: role (`prompt`, `chosen`, ...) to column.

    Raises:
        UsageError: a named column is missing, no kind fits, or two columns may play one role.
    """
    names, given = list(available), dict(given or {})
    _check_given(names, given, where)
    found = {role: [given[role]] if role in given else _named(names, role) for role in COLUMNS}
    kinds = [kind] if kind else list(KINDS)
    for one in kinds:
        if all(found[role] for role in KINDS[one]):
            roles = [*KINDS[one], *(["prompt"] if one == "preference" and found["prompt"] else [])]
            return Columns(one, {role: _only(found[role], role, where) for role in roles})
    wanted = "; or ".join(" and ".join(KINDS[one]) for one in kinds)
    raise UsageError(
        "the columns do not say what the rows are",
        where=where,
        expected=wanted,
        found=f"columns {brief(', '.join(names))}",
        remedy="name them, such as columns = { prompt = \"...\", completion = \"...\" }",
    )  # fmt: skip


def _check_given(names: Sequence[str], given: Mapping[str, str], where: object) -> None:
    for role, column in given.items():
        if role not in COLUMNS:
            raise UsageError("no such role of a column", where=where, expected=", ".join(COLUMNS), found=role)
        if column not in names:
            found = brief(", ".join(names))
            raise UsageError("the data has no such column", where=f"{where}: {role}", expected=column, found=found)


def _named(names: Sequence[str], role: str) -> list[str]:
    return [name for name in names if name.lower() in COLUMNS[role]]


def _only(columns: Sequence[str], role: str, where: object) -> str:
    if len(columns) > 1:
        raise UsageError(
            "several columns may play this role",
            where=f"{where}: {role}",
            expected="one",
            found=", ".join(columns),
            remedy="name the column",
        )
    return columns[0]


def _text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column} is no text", found=type(value).__name__ if value is not None else "nothing")
    if not value.strip():
        raise InputError(f"{column} is empty")
    return _whole(value, column)


def _whole(text: str, column: str) -> str:
    """`text`, if it has no half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{column} has half a surrogate pair") from None
    return text


def _answered(prompt: Any, column: str, answer: Any, answer_column: str) -> Completion | Chat:
    """Prompt and answer as texts; as messages where either is a list of them."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(_whole(prompt, column), _text(answer, answer_column))
    if isinstance(answer, str) and prompt is None:
        raise InputError(f"{column} is missing")
    if answer is None:
        raise InputError(f"{answer_column} is missing")
    before = () if prompt is None else _messages(prompt, column, "user")
    return Chat((*before, *_messages(answer, answer_column, "assistant")), len(before))


def _messages(value: Any, column: str, speaker: str | None = None) -> tuple[Message, ...]:
    """Messages in the form of chat templates; a text is one message of `speaker`."""
    if isinstance(value, str) and speaker:
        return ({"role": speaker, "content": _text(value, column)},)
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise InputError(f"{column} is no list of messages", found=brief(value))
    return tuple(_message(one, f"{column}[{index}]") for index, one in enumerate(value))


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is no message", expected="role and content", found=brief(value))
    if "from" in value and "role" not in value:
        speaker = value["from"]
        value = {"role": _SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker,
                 "content": value.get("value")}  # fmt: skip
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            raise InputError(f"{where} has no {key}", expected="a text", found=brief(value.get(key)))
        _whole(value[key], f"{where} {key}")
    return dict(value)
