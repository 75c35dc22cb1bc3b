"""`extend`: merges learnt on a corpus go behind the old ones, and each brings a token.

Old merges come first when a text is cut, so the new cut is the old one with some neighbours joined; a text without any
new token keeps its ids, and the model its logits. That holds with `ignore_merges` too, where a word that is a token is
not merged: nothing was merged across the ends of the parts of a new token, so its text alone was cut into the same
parts. WordPiece, which takes the longest token each time, keeps less of that: a text without any new token keeps its
ids, but beside a new token the rest of a word may be cut otherwise. It is the batch merging of Dynamic Tokenization
(arXiv 2411.18553) decided once, on a corpus: every loader knows what to do with it, and the model can write the new
tokens too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from itertools import groupby

from regraft.core.errors import InputError, Unsupported
from regraft.plugins.tokenizer_retrofit.assembly import added_entries, assemble
from regraft.plugins.tokenizer_retrofit.corpus import count_words
from regraft.plugins.tokenizer_retrofit.merges import Merge, Word, learn_merges
from regraft.plugins.tokenizer_retrofit.spelling import CHARACTERS, byte_piece
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary, Origin

_PREFERENCE = 1e-4
"""What a Unigram piece scores above its parts together, so that it is chosen in their place."""


def extend(
    old: TokenizerFile,
    rows: int,
    texts: Iterable[str],
    *,
    size: int,
    min_count: int,
    max_length: int,
    repair_bytes: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> NewVocabulary:
    """The old vocabulary and up to `size` tokens more.

    Args:
        old: what is extended.
        rows: of the embeddings; those that no token uses are used first, in order.
        texts: the corpus.
        size: most new tokens.
        min_count: pairs seen less often are not merged.
        max_length: of a new token, in characters of the vocabulary's alphabet.
        repair_bytes: append the bytes that a byte-level vocabulary lacks, before the new tokens; their rows are the
            mean of all, and no merge goes through them.
        tell: shows progress.

    Raises:
        Unsupported: bytes are to be repaired in a vocabulary that is not byte-level.
        InputError: nothing in the corpus can be merged; `tokenizers` does not read the file.
    """
    missing = missing_bytes(old) if repair_bytes else []
    bytes_ = {symbol: old.rows + place for place, symbol in enumerate(missing)}
    able = assemble(old, {**old.ids, **bytes_}, merges=old.merges, added=added_entries(old)) if missing else old
    words = count_words(texts, able, tell=_telling(tell, "{:,} characters of the corpus read", every=1 << 20))
    apart = {*map(byte_piece, range(256))} if old.spelling == "pieces" else {*missing}
    if old.unknown is not None:
        apart.add(old.unknown)
    if apart:
        words = _parted(words, able.ids.keys() - apart)
    merges = learn_merges(
        words, size, taken=able.ids, min_count=min_count, max_length=max_length, join=old.joined,
        tell=_telling(tell, f"{{}} of {size} merges learnt", every=512),
    )  # fmt: skip
    if not merges:
        raise InputError(
            "the corpus has nothing to merge", where="corpus", expected=f"a pair of tokens seen {min_count} times",
            remedy="give more text, or lower min_count",
        )  # fmt: skip
    compositions = _compositions(old.ids, merges)
    ids = dict(zip(compositions, range(able.rows, able.rows + len(merges)), strict=True))
    pairs = [*old.merges, *((merge.left, merge.right) for merge in merges)]
    new = assemble(old, {**able.ids, **ids}, merges=pairs, scores=_scores(old, merges), added=added_entries(old))
    origins = [Origin(kept=index) for index in range(rows)] + [Origin()] * (new.rows - rows)
    for index in bytes_.values():
        origins[index] = Origin()
    for token, index in ids.items():
        origins[index] = Origin(parts=compositions[token])
    notes = [f"{len(merges)} of {size} tokens: no other pair stands {min_count} times in the corpus"]
    if len(merges) == size:
        notes = []
    if old.kind == "WordPiece":
        notes.append("WordPiece takes the longest token each time: beside a new token a word may be cut otherwise")
    if repair_bytes:
        notes.append(f"{len(missing)} bytes that the vocabulary lacked")
    figures = {"merges": len(merges), **({"repaired_bytes": len(missing)} if repair_bytes else {})}
    return NewVocabulary(new, origins, figures, tuple(notes))


def missing_bytes(old: TokenizerFile) -> list[str]:
    """The byte symbols that a byte-level vocabulary lacks, in order of bytes; text that holds them is lost.

    Raises:
        Unsupported: it is not byte-level.
    """
    if old.spelling != "bytes":
        raise Unsupported("only byte-level vocabularies have bytes to repair", where=old.label,
                          remedy="leave repair_bytes out")  # fmt: skip
    return [symbol for _, symbol in sorted(CHARACTERS.items()) if symbol not in old.vocab]


def _telling(tell: Callable[[str], None], line: str, *, every: int) -> Callable[[int], None]:
    """Shows the line each time a count has grown by `every`."""
    last = 0

    def show(count: int) -> None:
        nonlocal last
        if count >= last + every:
            last = count
            tell(line.format(count))

    return show


def _parted(words: Mapping[Word, int], able: Set[str]) -> Counter[Word]:
    """Words cut at what no merge is to go through, and that is left out: tokens beside `able`.

    A token of several byte pieces would not be decoded; one with a part that stands for whatever is unknown (which
    Unigram gives as the text itself, no token at all) would mean no text.
    """
    found: Counter[Word] = Counter()
    for word, count in words.items():
        for whole, run in groupby(word, able.__contains__):
            if whole:
                found[tuple(run)] += count
    return found


def _compositions(ids: Mapping[str, int], merges: Sequence[Merge]) -> dict[str, tuple[int, ...]]:
    """The old ids that spell each new token, in order of the merges."""
    made: dict[str, tuple[int, ...]] = {}
    for merge in merges:
        left, right = ((made[part] if part in made else (ids[part],)) for part in (merge.left, merge.right))
        made[merge.token] = left + right
    return made


def _scores(old: TokenizerFile, merges: Sequence[Merge]) -> dict[str, float]:
    """Scores of Unigram pieces; a new one scores a little more than its parts together, so that it is chosen."""
    scores = dict(old.scores)
    for merge in merges if scores else ():
        scores[merge.token] = scores[merge.left] + scores[merge.right] + _PREFERENCE
    return scores
