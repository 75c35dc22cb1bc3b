"""`boundary = "none"`: a pre-tokenizer that cuts at the ends of lines and around numbers alone, so that tokens may span
words; numbers are cut as the base cuts them.

Lines stay apart so that the work of cutting a text is bounded by its longest line.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.plugins.tokenizer_retrofit.metadata import OWN_CLASS
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile, stages_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_CHARACTERS = 512
"""Of a line, in training: a merge goes through whole parts."""

_LINE_ENDS = r"[\r\n]+"
_NUMBERS: Mapping[str, str] = MappingProxyType({
    "digit by digit": r"\p{N}",
    "in threes from the left": r"\p{N}{1,3}",
    "in threes from the right": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))",
    "whole": r"\p{N}+",
})  # fmt: skip
_PROBES = ("a1234567b", "a12b", "a1234b", "a12345678901b")
_SPACE = re.compile(r"(?<=\s)(?=\S)")


def check_superwords(checkpoint: Checkpoint, old: TokenizerFile) -> None:
    """Whether the base can have another pre-tokenizer.

    Raises:
        Unsupported: transformers gives the model's type a pre-tokenizer of its own; the base's stages cannot be told
            apart; it cuts numbers in a way that none of ours does.
    """
    kind = checkpoint.config.get("model_type")
    if kind in OWN_CLASS:
        raise Unsupported(
            "transformers gives models of this type a pre-tokenizer of its own, which no token goes beyond",
            where=f'{checkpoint.label}: boundary = "none"', found=kind, remedy='use boundary = "pretoken"',
        )  # fmt: skip
    line_stages(old)


def line_stages(old: TokenizerFile) -> dict[str, Any]:
    """The old file's document with the other pre-tokenizer.

    Raises:
        Unsupported: as `check_superwords`.
    """
    document = copy.deepcopy(dict(old.document))
    numbers = _number_pattern(old)
    patterns = [_LINE_ENDS, *([numbers] if numbers is not None else [])]
    cuts = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*cuts, *_alphabet_stage(old)]}
    marks = [stage for stage in stages_of(old.document, "decoder") if stage.get("type") == "Metaspace"]
    if marks:
        document["decoder"] = {"type": "Sequence", "decoders": _decoders(marks[0])}
    return document


def short_lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines with their ends; longer ones in parts of `PART_CHARACTERS`, and up to the next word."""
    for text in texts:
        for line in text.splitlines(keepends=True):
            start = 0
            while len(line) - start > PART_CHARACTERS:
                found = _SPACE.search(line, start + PART_CHARACTERS, start + 2 * PART_CHARACTERS)
                stop = found.start() if found is not None else start + PART_CHARACTERS
                yield line[start:stop]
                start = stop
            yield line[start:]


def _alphabet_stage(old: TokenizerFile) -> list[dict[str, Any]]:
    """What writes the text in the alphabet of the model, and cuts nothing."""
    stages = list(stages_of(old.document, "pre_tokenizer"))
    marks = [stage for stage in stages if stage.get("type") == "Metaspace"]
    if old.spelling == "bytes":
        if not any(stage.get("type") == "ByteLevel" for stage in stages):
            raise Unsupported(
                "writes bytes in another stage than the pre-tokenizer, so no other can take its place",
                where=f'{old.label}: boundary = "none"', remedy='use boundary = "pretoken"',
            )  # fmt: skip
        return [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]
    return [_whole(stage) for stage in marks[:1]]


def _whole(stage: Mapping[str, Any]) -> dict[str, Any]:
    """A stage that marks spaces, without cutting there; nothing is put before what a cut left over."""
    first = "first" if _prepends(stage) else "never"
    return {"type": "Metaspace", "replacement": stage["replacement"], "prepend_scheme": first, "split": False}


def _decoders(stage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """In place of a decoder that drops every mark in the first token of a text, one that drops the first mark alone."""
    marks = {"type": "Replace", "pattern": {"String": stage["replacement"]}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return [marks, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] if _prepends(stage) else [])]


def _prepends(stage: Mapping[str, Any]) -> bool:
    return stage.get("prepend_scheme") != "never" and stage.get("add_prefix_space") is not False


def _number_pattern(old: TokenizerFile) -> str | None:
    """What cuts numbers as the base does; None where it leaves them to its merges."""
    from tokenizers import Regex, pre_tokenizers

    wanted = [_numbers(old.backend(), probe) for probe in _PROBES]
    if not any(wanted):
        several = any(re.search(rb"\d\d", old.bytes_of(token) or b"") for token in old.vocab.keys() - old.verbatim)
        return None if several else _NUMBERS["digit by digit"]
    for pattern in _NUMBERS.values():
        stage = pre_tokenizers.Split(Regex(pattern), "isolated")
        if [_digits(piece for piece, _ in stage.pre_tokenize_str(probe)) for probe in _PROBES] == wanted:
            return pattern
    raise Unsupported(
        "cuts numbers in a way that no other pre-tokenizer here does", where=f'{old.label}: boundary = "none"',
        expected=", or ".join(_NUMBERS), found="-".join(wanted[0]), remedy='use boundary = "pretoken"',
    )  # fmt: skip


def _numbers(backend: Tokenizer, probe: str) -> list[str]:
    stage = backend.pre_tokenizer
    return [] if stage is None else _digits(piece for piece, _ in stage.pre_tokenize_str(probe))


def _digits(pieces: Iterable[str]) -> list[str]:
    return [piece for piece in pieces if piece.isdigit()]
