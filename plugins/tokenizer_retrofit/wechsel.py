"""WECHSEL rows: new tokens as mixtures of the old ones whose words mean the like, by word vectors of two languages.

Minixhofer, Paischer and Rekabsaz (arXiv 2112.06598), section 3: static vectors of both languages in one space, the row
of a new token the softmax-weighted sum of its ten nearest old tokens. The vectors are the user's, in fastText's text
form (`.vec`); a dictionary of word pairs aligns the spaces by orthogonal Procrustes. Vectors of character n-grams,
which the paper takes from fastText's binary form, are not read: a token has a vector if its text is a word of the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.buffers import unreadable
from regraft.core.errors import InputError
from regraft.plugins.tokenizer_retrofit.focus import Mixture

if TYPE_CHECKING:
    import torch

NEIGHBOURS, TEMPERATURE = 10, 0.1
_AT_ONCE = 512


def read_vectors(path: Path, words: Iterable[str]) -> dict[str, list[float]]:
    """The vectors of some words, from a text file: a line with number and dimension, then a word and its numbers.

    Raises:
        InputError: the file cannot be read, or a line does not have as many numbers as the first says.
    """
    wanted, found = set(words), {}
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            head = file.readline().split()
            if len(head) != 2 or not all(part.isdecimal() for part in head):
                raise InputError("is no file of word vectors", where=path, expected="NUMBER DIMENSION first",
                                 found=" ".join(head[:4]), remedy="give fastText's text form, .vec")  # fmt: skip
            for number, line in enumerate(file, start=2):
                word, *values = line.rstrip("\n ").split(" ")
                if word not in wanted or word in found:
                    continue
                if len(values) != int(head[1]):
                    raise InputError("a word has another number of dimensions", where=f"{path}:{number}",
                                     expected=head[1], found=len(values))  # fmt: skip
                found[word] = [float(value) for value in values]
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise InputError("a vector holds what is no number", where=path, found=error) from None
    return found


def read_dictionary(path: Path) -> list[tuple[str, str]]:
    """Pairs of words, one pair a line, the old language's first; separated by blanks.

    Raises:
        InputError: the file cannot be read, or a line is no pair.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise InputError("is not UTF-8 text", where=path, found=error.reason, remedy="convert the file") from None
    pairs = [line.split() for line in lines if line.strip()]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2:
            raise InputError("is no pair of words", where=f"{path}:{number}", found=" ".join(pair))
    return [(one, other) for one, other in pairs]


def aligned(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[d, d] the orthogonal W for which `source @ W` comes nearest to `target` (Schönemann 1966).

    Args:
        source, target: [n, d] vectors of word pairs.
    """
    import torch

    left, _, right = torch.linalg.svd(source.T.double() @ target.double())
    rotation: torch.Tensor = left @ right
    return rotation.to(source.dtype)


def neighbours(
    new: Mapping[int, Sequence[float]],
    old: Mapping[int, Sequence[float]],
    rotation: torch.Tensor | None = None,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Mixture:
    """For each new token its k nearest old ones by cosine, weighted by softmax(cosine / temperature).

    Args:
        new, old: vectors by token id.
        rotation: takes old vectors into the space of the new.
        k: neighbours.
        temperature: of the softmax.
    """
    import torch

    if not new or not old:
        return {}
    ids = list(old)
    table = torch.tensor([list(old[index]) for index in ids])
    table = torch.nn.functional.normalize(table if rotation is None else table @ rotation)
    found: Mixture = {}
    rows = list(new)
    for start in range(0, len(rows), _AT_ONCE):
        piece = rows[start : start + _AT_ONCE]
        vectors = torch.nn.functional.normalize(torch.tensor([list(new[index]) for index in piece]))
        best = (vectors @ table.T).topk(min(k, len(ids)), dim=1)
        shares = (best.values / temperature).softmax(1)
        for row, places, share in zip(piece, best.indices.tolist(), shares.tolist(), strict=True):
            found[row] = ([ids[place] for place in places], share)
    return found
