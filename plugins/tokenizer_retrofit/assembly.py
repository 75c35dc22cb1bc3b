"""A tokenizer.json from the stages of another and new tokens: vocabulary, merges, added tokens, post-processor."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from regraft.core.errors import TransformationError
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

_UNLIKELY = -100.0
"""Score of a token among Unigram pieces that is only ever matched verbatim."""


def assemble(
    stages: TokenizerFile,
    ids: Mapping[str, int],
    *,
    merges: Sequence[tuple[str, str]] = (),
    scores: Mapping[str, float] | None = None,
    added: Sequence[Mapping[str, Any]] = (),
    unknown: str | None = None,
) -> TokenizerFile:
    """The file `stages` with another vocabulary.

    Added tokens stand in the model's vocabulary too, since `tokenizers` numbers those that do not anew.

    Args:
        stages: whose normaliser, pre-tokenizer, decoder and other settings stay.
        ids: of every token, added ones included.
        merges: of a BPE model, in order.
        scores: of Unigram pieces; tokens without one are matched verbatim only.
        added: entries of `added_tokens`; their ids are looked up.
        unknown: the token for what Unigram pieces cannot spell, where it is not that of `stages`.

    Raises:
        TransformationError: Unigram ids have holes; the post-processor names a token that is gone.
    """
    document = copy.deepcopy(dict(stages.document))
    model = document["model"]
    ordered = dict(sorted(ids.items(), key=lambda item: item[1]))
    if stages.kind == "Unigram":
        model["vocab"] = _pieces(ordered, scores or {}, stages.label)
        unknown = unknown or stages.unknown
        model["unk_id"] = None if unknown is None else _id(ids, unknown, stages.label)
    else:
        model["vocab"] = ordered
    if stages.kind == "BPE":
        model["merges"] = _merges(stages, merges)
    document["added_tokens"] = [
        {**entry, "id": ids[entry["content"]]} for entry in sorted(added, key=lambda entry: ids[entry["content"]])
    ]
    _renumber(document.get("post_processor"), ids, stages.label)
    padding = document.get("padding")
    if isinstance(padding, dict) and padding.get("pad_token") in ids:
        padding["pad_id"] = ids[padding["pad_token"]]
    return TokenizerFile.parse(document, stages.label)


def added_entries(tokenizer: TokenizerFile) -> list[Mapping[str, Any]]:
    """The entries of `added_tokens`."""
    return list(tokenizer.document.get("added_tokens") or ())


def place(fixed: Mapping[str, int], others: Iterable[str]) -> dict[str, int]:
    """Dense ids: those of `fixed` where they are small enough, the other tokens in order in the places left.

    Args:
        fixed: tokens and the ids that they had.
        others: the rest; one that is among `fixed` is placed once.
    """
    rest = [token for token in dict.fromkeys(others) if token not in fixed]
    total = len(fixed) + len(rest)
    taken = {index: token for token, index in fixed.items() if index < total}
    late = [token for token, index in sorted(fixed.items(), key=lambda item: item[1]) if index >= total]
    free = iter([*rest, *late])
    return {taken.get(index) or next(free): index for index in range(total)}


def _pieces(ids: Mapping[str, int], scores: Mapping[str, float], label: str) -> list[list[Any]]:
    if list(ids.values()) != list(range(len(ids))):
        raise TransformationError("the ids of Unigram pieces have holes", where=label)
    return [[token, scores.get(token, _UNLIKELY)] for token in ids]


def _merges(stages: TokenizerFile, merges: Sequence[tuple[str, str]]) -> list[Any]:
    """Written as they were before, as pairs where a token has a space in it."""
    before = stages.model.get("merges") or ()
    as_text = any(isinstance(entry, str) for entry in before[:1])
    if as_text and not any(" " in part for pair in merges for part in pair):
        return [f"{left} {right}" for left, right in merges]
    return [list(pair) for pair in merges]


def _renumber(stage: Any, ids: Mapping[str, int], label: str) -> None:
    """New ids for the tokens that a post-processor puts around texts, found by their names."""
    if not isinstance(stage, dict):
        return
    for inner in stage.get("processors") or ():
        _renumber(inner, ids, label)
    special = stage.get("special_tokens")
    for entry in special.values() if isinstance(special, dict) else ():
        entry["ids"] = [_id(ids, token, label) for token in entry["tokens"]]
    for key in ("sep", "cls"):
        if isinstance(pair := stage.get(key), list) and len(pair) == 2:
            stage[key] = [pair[0], _id(ids, pair[0], label)]


def _id(ids: Mapping[str, int], token: str, label: str) -> int:
    if token not in ids:
        raise TransformationError("names a token that the new vocabulary lacks", where=f"{label}: post_processor",
                                  found=repr(token))  # fmt: skip
    return ids[token]
