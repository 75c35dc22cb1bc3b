"""Whether a tokenizer.json has the form that everything here relies on; what its tokens mean is for others to judge."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from regraft.core.errors import InputError
from regraft.core.jsonio import brief

MAX_IDS = 1 << 32
"""The `tokenizers` library counts in 32 bits."""


def check_form(document: Mapping[str, Any], label: str) -> None:
    """Refuse a document whose lists hold something else than tokens, ids, scores and merges.

    Args:
        document: has a `model`, which is an object.
        label: how messages name it.

    Raises:
        InputError: naming the first fault.
    """
    model = document["model"]
    added, vocab, merges = document.get("added_tokens"), model.get("vocab"), model.get("merges", [])
    if added is not None and not isinstance(added, list):
        raise _fault("added_tokens", "a list", added, label)
    for entry in added or ():
        if isinstance(entry, Mapping) and not _is_id(entry.get("id")):
            raise _fault("added_tokens", f"ids below {MAX_IDS}", entry.get("id"), label)
    if isinstance(vocab, Mapping):
        for index in vocab.values():
            if not _is_id(index):
                raise _fault("model.vocab", f"ids below {MAX_IDS}", index, label)
    if isinstance(vocab, list):
        for piece in vocab:
            if not _is_piece(piece):
                raise _fault("model.vocab", "pieces with their scores", piece, label)
    if not (isinstance(merges, list) and all(isinstance(one, str | list) for one in merges)):
        raise _fault("model.merges", "a list of pairs", merges, label)
    if not isinstance(model.get("unk_id"), int | None):
        raise _fault("model.unk_id", "the number of a piece", model["unk_id"], label)
    if model.get("type") == "Unigram" and not isinstance(vocab, list):
        raise _fault("model.vocab", "a list of pieces with their scores", vocab, label)


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_IDS


def _is_piece(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        return False
    score = value[1]
    return type(score) in (int, float) and abs(score) <= sys.float_info.max


def _fault(key: str, expected: str, found: Any, label: str) -> InputError:
    return InputError("is malformed", where=f"{label}: {key}", expected=expected, found=brief(found),
                      remedy="fetch the tokenizer again")  # fmt: skip
