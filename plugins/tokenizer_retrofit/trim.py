"""`trim`: only the tokens that a corpus uses stay, and those that their merges go through.

What is kept: every token of every word of the corpus, and, for BPE, every token that its merging goes through, so that
each line of the corpus is cut as before; the added tokens; the alphabet, so that any other text can still be written,
in smaller pieces; what configs, post-processor and chat template name. The rows that stay keep their bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from regraft.core.errors import UsageError
from regraft.plugins.tokenizer_retrofit.assembly import added_entries, assemble
from regraft.plugins.tokenizer_retrofit.corpus import count_words
from regraft.plugins.tokenizer_retrofit.merges import Pair, merged
from regraft.plugins.tokenizer_retrofit.spelling import CHARACTERS, CONTINUES, SPACE, byte_piece
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary, Origin


def trim(
    old: TokenizerFile,
    texts: Iterable[str],
    *,
    keep: Iterable[str] = (),
    keep_ids: Iterable[int] = (),
    min_count: int = 1,
    tell: Callable[[int], None] | None = None,
) -> NewVocabulary:
    """The old vocabulary without what the corpus does not use, in the old order.

    Args:
        old: what is trimmed.
        texts: the corpus.
        keep: texts whose tokens stay, however rare.
        keep_ids: tokens that stay, such as those that configs name.
        min_count: words of the corpus that stand in it less often are left to the smaller pieces.
        tell: called with the number of characters read.

    Raises:
        UsageError: `keep_ids` names no token.
    """
    words = count_words(texts, old, tell=tell)
    used = {word for word, count in words.items() if count >= min_count} | set(count_words(keep, old))
    kept = set(old.verbatim) | alphabet(old) | {token for word in used for token in word}
    for index in keep_ids:
        if index not in old.tokens:
            raise UsageError("there is no such token id", where="keep_ids", expected=f"below {old.rows}", found=index)
        kept.add(old.tokens[index])
    merges: Sequence[tuple[str, str]] = ()
    if old.kind == "BPE":
        kept |= _passed(old.merges, (_symbols(word, old) for word in used))
        kept = _closed(old.merges, kept)
        merges = [pair for pair in old.merges if {*pair, "".join(pair)} <= kept]
    tokens = [token for token in old.tokens.values() if token in kept]
    ids = {token: index for index, token in enumerate(tokens)}
    new = assemble(old, ids, merges=merges, scores=old.scores, added=added_entries(old))
    origins = [Origin(kept=old.ids[token]) for token in tokens]
    figures = {"kept": len(tokens), "gone": len(old.tokens) - len(tokens), "merges": len(merges)}
    return NewVocabulary(new, origins, figures)


def alphabet(old: TokenizerFile) -> set[str]:
    """Tokens of one symbol: bytes, byte pieces and characters, and the token for what is unknown."""
    single = {token for token in old.vocab if len(token.removeprefix(CONTINUES).removeprefix(SPACE)) <= 1}
    bytes_ = {*CHARACTERS.values()} if old.spelling == "bytes" else {byte_piece(byte) for byte in range(256)}
    found = (bytes_ & old.vocab.keys()) if old.spelling == "bytes" else single | (bytes_ & old.vocab.keys())
    return found | ({old.unknown} if old.unknown is not None else set())


def _symbols(word: Iterable[str], old: TokenizerFile) -> list[str]:
    """What merging begins with: characters, and bytes of characters that the vocabulary lacks."""
    pieces = {byte_piece(byte) for byte in range(256)} if old.spelling == "pieces" else set()
    return [symbol for token in word for symbol in ([token] if token in pieces else token)]


def _passed(merges: Sequence[Pair], words: Iterable[list[str]]) -> set[str]:
    """Every token that merging makes on the way to the words' tokens."""
    rank = {pair: number for number, pair in enumerate(merges)}
    found: set[str] = set()
    for word in words:
        while True:
            pairs = [pair for pair in pairwise(word) if pair in rank]
            if not pairs:
                break
            pair = min(pairs, key=rank.__getitem__)
            word = merged(word, pair, "".join(pair))
            found.add("".join(pair))
    return found


def _closed(merges: Sequence[Pair], kept: set[str]) -> set[str]:
    """With both parts of the first merge that makes each token, and theirs."""
    first: Mapping[str, Pair] = {"".join(pair): pair for pair in reversed(merges)}
    found, open_ = set(kept), list(kept)
    while open_:
        for part in first.get(open_.pop(), ()):
            if part not in found:
                found.add(part)
                open_.append(part)
    return found
