"""How two tokenizers differ: tokens and merges of `tokenizer.json`, and the chat template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError
from regraft.core.verify.structure import TOKENIZER

_SHOWN = 60


@dataclass(frozen=True)
class Vocabularies:
    """Two tokenizers side by side.

    Args:
        tokens: numbers of tokens.
        merges: numbers of merges; None where the model of the tokenizer has none.
        added, removed: numbers of tokens that only one side has.
        renumbered: tokens that both have, with other ids.
        examples: some of those added, as the file spells them.
        gone: some of those removed.
        elsewhere: parts of the file that differ besides.
    """

    tokens: tuple[int, int]
    merges: tuple[int | None, int | None]
    added: int
    removed: int
    renumbered: int
    examples: tuple[str, ...]
    gone: tuple[str, ...]
    elsewhere: tuple[str, ...]


def vocabularies(before: Checkpoint, after: Checkpoint) -> Vocabularies | None:
    """How `tokenizer.json` differs; None where it is the same, missing on a side, or is not understood."""
    files = [checkpoint.files.get(TOKENIZER) for checkpoint in (before, after)]
    if files[0] is None or files[1] is None or files[0].read() == files[1].read():
        return None
    try:
        one, other = (checkpoint.json(TOKENIZER) for checkpoint in (before, after))
        old, new = _tokens(one), _tokens(other)
    except (InputError, TypeError, ValueError, KeyError, IndexError):
        return None
    fresh = [token for token in new if token not in old]
    lost = [token for token in old if token not in new]
    return Vocabularies(
        (len(old), len(new)), (_merges(one), _merges(other)), len(fresh), len(lost),
        sum(new[token] != number for token, number in old.items() if token in new),
        tuple(sorted(fresh, key=new.__getitem__)[:_SHOWN]), tuple(sorted(lost, key=old.__getitem__)[:_SHOWN]),
        tuple(sorted(part for part in {*one, *other} - {"model", "added_tokens"} if one.get(part) != other.get(part))),
    )  # fmt: skip


def _tokens(document: Mapping[str, Any]) -> dict[str, int]:
    """Token by id: of a dictionary (BPE, WordPiece), of a list of (token, score) (Unigram), and those added."""
    vocabulary = document["model"]["vocab"]
    tokens = dict(vocabulary) if isinstance(vocabulary, dict) else {item[0]: at for at, item in enumerate(vocabulary)}
    return tokens | {item["content"]: item["id"] for item in document.get("added_tokens") or ()}


def _merges(document: Mapping[str, Any]) -> int | None:
    merges = document["model"].get("merges")
    return len(merges) if isinstance(merges, list) else None
