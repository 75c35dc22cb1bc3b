"""The tokens that are appended: learnt on a corpus, or read from a list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.errors import InputError
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.large.params import LargeVocabularyParams
from regraft.plugins.tokenizer_retrofit.spell import Speller
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Appended:
    """New tokens, in the order of their ids.

    Args:
        data: the bytes of each.
        parts: the old ids that spell each, two or more.
        left_out: how many of a list were no new tokens, by reason.
        notes: for the user.
    """

    data: Sequence[bytes]
    parts: Sequence[tuple[int, ...]]
    left_out: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def tensors(self) -> dict[str, torch.Tensor]:
        """For tokens.safetensors: `bytes` [total] and where each token `ends` [n]; `parts` [total], `part_ends` [n]."""
        import torch

        def ends(of: Iterable[Sequence[int]]) -> torch.Tensor:
            return torch.tensor([len(one) for one in of], dtype=torch.int64).cumsum(0)

        data = bytearray(b"".join(self.data))
        return {
            "bytes": torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8),
            "ends": ends(self.data),
            "parts": torch.tensor([index for part in self.parts for index in part], dtype=torch.int64),
            "part_ends": ends(self.parts),
        }


def appended(old: TokenizerFile, rows: int, params: LargeVocabularyParams, run: Run) -> Appended:
    """What the parameters ask for; nothing where they only ask for an index.

    Args:
        old: the tokenizer.
        rows: of the model.
        params: size and corpus, or a list.
        run: shows progress.

    Raises:
        InputError: the corpus has nothing to merge; the list is no text, or has no new token.
    """
    if params.tokens is not None:
        return listed(old, params.tokens)
    if not params.size:
        return Appended((), ())
    from regraft.plugins.tokenizer_retrofit.extend import extend

    assert params.corpus is not None
    new = extend(
        old, rows, Corpus(params.corpus, params.corpus_bytes).texts(), size=params.size, min_count=params.min_count,
        max_length=params.max_length, tell=run.tell,
    )  # fmt: skip
    found: dict[bytes, tuple[int, ...]] = {}
    known = Speller(old).by_bytes
    for index in range(len(new.origins)):
        parts = new.origins[index].parts
        data = new.tokenizer.bytes_of(new.tokenizer.tokens[index]) if parts else None
        if data and data not in known:
            found.setdefault(data, parts)
    return Appended(list(found), list(found.values()), notes=new.notes)


def listed(old: TokenizerFile, file: Path) -> Appended:
    """The tokens of a text file, one a line; a byte order mark in front is none of them.

    Raises:
        InputError: it is no UTF-8 text, or has no new token.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError("is no UTF-8 text", where=file, found=error.reason, remedy="give one token a line") from None
    speller = Speller(old)
    found: dict[bytes, tuple[int, ...]] = {}
    left_out = {"known": 0, "repeated": 0, "unspelled": 0}
    for line in lines:
        data = line.encode()
        if not data or data in found:
            left_out["repeated"] += bool(data)
        elif data in speller.by_bytes or line in old.verbatim:
            left_out["known"] += 1
        else:
            parts = tuple(speller.spell(data))
            if b"".join(old.bytes_of(old.tokens[part]) or b"" for part in parts) == data:
                found[data] = parts
            else:
                left_out["unspelled"] += 1
    if not found:
        raise InputError("the list has no new token", where=file, found=f"{len(lines)} lines",
                         remedy="give one token a line")  # fmt: skip
    return Appended(list(found), list(found.values()), left_out)
