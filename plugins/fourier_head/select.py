"""Which token ids are the bins, in order, and what they are worth: from tokenizer.json and parameters alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.verify.structure import TOKENIZER, token_ids
from regraft.plugins.fourier_head.params import FourierHeadParams

_SPACE_MARKS = str.maketrans({"\u0120": " ", "\u2581": " "})
"""How byte-level and sentencepiece tokenizers write a space."""

_SHOWN = 5


@dataclass(frozen=True)
class Bins:
    """The bins among the token ids.

    Args:
        start, count: ids start .. start + count - 1.
        vocab_size: of the result; larger than before where tokens are appended.
        texts: what the tokens say; empty where that is not known.
        edges: count + 1 ascending values, for bins by value; None for equal ones.
        range: what the first and the last edge are worth.
        appended: whether the tokens are new.
    """

    start: int
    count: int
    vocab_size: int
    texts: tuple[str, ...]
    edges: tuple[float, ...] | None
    range: tuple[float, float]
    appended: bool = False

    @property
    def stop(self) -> int:
        """One behind the last id."""
        return self.start + self.count


def select(checkpoint: Checkpoint, params: FourierHeadParams, rows: int) -> Bins:
    """The bins of a model whose embeddings have `rows` rows.

    Raises:
        UsageError: nothing is matched; the tokens are not one range of ids, or hold special ones; their values do not
            ascend; as many frequencies as bins.
        Unsupported: tokens are asked for by text, and there is no tokenizer.json.
        InputError: tokenizer.json is malformed, or has ids beyond the embeddings.
    """
    tokens = token_ids(checkpoint.json(TOKENIZER))
    if tokens and max(tokens.values()) >= rows:
        raise InputError(
            "the tokenizer has ids beyond the embedding's rows", where=f"{checkpoint.label}: {TOKENIZER}",
            expected=f"ids below {rows}", found=max(tokens.values()), remedy="use the tokenizer of these weights",
        )  # fmt: skip
    if params.bins is not None:
        found = _appended(checkpoint, params, tokens, rows)
    else:
        ids = _chosen(checkpoint, params, tokens, rows)
        texts = {index: text.translate(_SPACE_MARKS) for text, index in tokens.items()}
        named = tuple(texts.get(index, "") for index in ids)
        _refuse_special(checkpoint, params, ids)
        edges = _edges(params, named)
        ends = params.ends or (-0.5, len(ids) - 0.5) if edges is None else (edges[0], edges[-1])
        found = Bins(ids[0], len(ids), rows, named, edges, ends)
    if params.num_frequencies >= found.count:
        raise UsageError(
            "there are as many frequencies as bins, or more: their masses would not sum to one",
            where="num_frequencies", expected=f"below {found.count}", found=params.num_frequencies,
            remedy="lower num_frequencies, or take more bins",
        )  # fmt: skip
    return found


def _chosen(checkpoint: Checkpoint, params: FourierHeadParams, tokens: Mapping[str, int], rows: int) -> Sequence[int]:
    """Ids of the bins, ascending, without a gap."""
    if params.mode == "replace":
        return range(rows)
    if params.ids is not None:
        if params.ids[1] >= rows:
            raise UsageError("there is no such token id", where="ids", expected=f"below {rows}", found=params.ids[1])
        return range(params.ids[0], params.ids[1] + 1)
    if not tokens:
        raise Unsupported(
            "tokens are looked up in tokenizer.json, which the checkpoint does not have",
            where=checkpoint.label, remedy="give `ids`, or save the tokenizer in the fast format",
        )  # fmt: skip
    if params.tokens is not None:
        return _spelt(params.tokens, tokens)
    return _matched(str(params.pattern), tokens)


def _spelt(written: str, tokens: Mapping[str, int]) -> Sequence[int]:
    first, dots, last = written.partition("..")
    if not dots or not first or not last:
        raise UsageError(
            "does not name a range of tokens", where="tokens", expected='"FIRST..LAST", such as "0..199"', found=written
        )
    numeric = first.isascii() and last.isascii() and first.isdecimal() and last.isdecimal()
    names = [str(number) for number in range(int(first), int(last) + 1)] if numeric else [first, last]
    if missing := [name for name in names if name not in tokens]:
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        raise UsageError(
            "the vocabulary does not have all these tokens", where="tokens", expected=written, found=f"no {shown}",
            remedy="take a range that has a token for each, or append tokens with `bins`",
        )  # fmt: skip
    ids = [tokens[name] for name in names]
    if not numeric:
        ids = list(range(ids[0], ids[1] + 1))
    return _consecutive(ids, names, "tokens")


def _matched(pattern: str, tokens: Mapping[str, int]) -> Sequence[int]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError("is no regular expression", where="pattern", found=f"{pattern}: {error}") from None
    texts = {index: text.translate(_SPACE_MARKS) for text, index in tokens.items()}
    ids = sorted(index for index, text in texts.items() if expression.fullmatch(text))
    if len(ids) < 2:
        raise UsageError(
            "matches no two tokens", where="pattern", expected="at least two tokens, matched as a whole",
            found=f"{len(ids)} of {len(texts)} tokens match {pattern!r}",
            remedy="a leading space of a token is a space in the expression",
        )  # fmt: skip
    return _consecutive(ids, [texts[index] for index in ids], "pattern")


def _consecutive(ids: Sequence[int], names: Sequence[str], where: str) -> Sequence[int]:
    if len(ids) < 2:
        raise UsageError("are fewer than two bins", where=where, expected="at least two", found=", ".join(names))
    for place, (one, other) in enumerate(itertools.pairwise(ids)):
        if other != one + 1:
            names = names if len(names) == len(ids) else [str(index) for index in ids]
            raise UsageError(
                "the tokens are not one range of ids in ascending order", where=where,
                expected=f"id {one + 1} behind {names[place]!r}", found=f"{names[place + 1]!r} with id {other}",
                remedy="name a part of them that is, with `ids`, or append tokens with `bins`",
            )  # fmt: skip
    return ids


def _refuse_special(checkpoint: Checkpoint, params: FourierHeadParams, ids: Sequence[int]) -> None:
    if params.mode == "replace":
        return
    special = _special(checkpoint)
    overlap = [f"{text!r} (id {index})" for index, text in sorted(special.items()) if ids[0] <= index <= ids[-1]]
    if overlap:
        raise UsageError(
            "the range has special tokens in it", where="the bins", expected="tokens of text alone",
            found=", ".join(overlap[:_SHOWN]), remedy="name a range without them",
        )  # fmt: skip


def _special(checkpoint: Checkpoint) -> dict[int, str]:
    """Special tokens of the tokenizer, and the ids that the configs name."""
    added = checkpoint.json(TOKENIZER).get("added_tokens")
    found = {
        int(token["id"]): str(token.get("content"))
        for token in (added if isinstance(added, list) else ())
        if isinstance(token, Mapping) and token.get("special") and isinstance(token.get("id"), int)
    }
    for config in (checkpoint.config, checkpoint.generation_config):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value: Any = config.get(key)
            for index in value if isinstance(value, list) else [value]:
                if isinstance(index, int) and not isinstance(index, bool):
                    found.setdefault(index, key)
    return found


def _edges(params: FourierHeadParams, texts: Sequence[str]) -> tuple[float, ...] | None:
    """Edges half way between neighbouring values; the first and the last bin are as wide towards both sides."""
    if params.coordinate == "index":
        return None
    values = list(params.values) if params.values is not None else [_number(text) for text in texts]
    if len(values) != len(texts):
        raise UsageError(
            "there is not one value for each bin", where="values", expected=len(texts), found=len(values),
            remedy="give as many values as bins",
        )  # fmt: skip
    for place, (one, other) in enumerate(itertools.pairwise(values)):
        if not one < other:
            raise UsageError(
                "the values of the tokens do not ascend with their ids", where="values",
                expected=f"more than {one:g} behind {texts[place]!r}", found=f"{texts[place + 1]!r}",
                remedy="give `values`, or leave coordinate out",
            )  # fmt: skip
    inner = [(one + other) / 2 for one, other in itertools.pairwise(values)]
    return (2 * values[0] - inner[0], *inner, 2 * values[-1] - inner[-1])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if value != value or value in (float("inf"), -float("inf")):
        raise UsageError(
            "a token of the range is no number", where="coordinate", expected="tokens that spell numbers",
            found=repr(text), remedy="give `values`, one for each bin",
        )  # fmt: skip
    return value


def _appended(checkpoint: Checkpoint, params: FourierHeadParams, tokens: Mapping[str, int], rows: int) -> Bins:
    """New tokens behind the tokenizer's last; rows that only padded the embeddings are used first."""
    assert params.bins is not None
    if not tokens:
        raise Unsupported(
            "tokens are appended to tokenizer.json, which the checkpoint does not have",
            where=checkpoint.label, remedy="save the tokenizer in the fast format",
        )  # fmt: skip
    names = tuple(bin_name(number) for number in range(params.bins))
    if taken := [name for name in names if name in tokens]:
        raise UsageError("the vocabulary has such a token already", where="bins", found=taken[0],
                         remedy="name the tokens that are there with `tokens` or `ids`")  # fmt: skip
    start = max(tokens.values()) + 1
    return Bins(start, params.bins, max(rows, start + params.bins), names, None, params.ends or (-1.0, 1.0), True)


def bin_name(number: int) -> str:
    """The token of an appended bin."""
    return f"<bin_{number}>"
