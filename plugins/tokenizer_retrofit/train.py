"""`replace-train`: a vocabulary of its own, trained on the corpus by the `tokenizers` library.

The stages around the model stay, so that numbers and blanks are cut as the model has learnt them; with
`boundary = "none"` the pre-tokenizer alone is another one, and keeps to the old way with numbers. The added tokens come
first, then all 256 bytes, so that no text is ever lost, whatever the old vocabulary could write.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any, Literal

from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.plugins.tokenizer_retrofit.assembly import added_entries, assemble, place
from regraft.plugins.tokenizer_retrofit.spell import Speller
from regraft.plugins.tokenizer_retrofit.spelling import CHARACTERS, SPACE, byte_piece
from regraft.plugins.tokenizer_retrofit.superwords import line_stages, short_lines
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary, Origin

Algorithm = Literal["bpe", "unigram", "longest-match"]

_DIGITS = 6
"""Of the scores of Unigram pieces, behind the point."""
_STEP, _STEP_MARGIN = 1e-4, 0.05
_LONGEST_WORD = 1 << 20
"""Characters of a word that longest match still cuts; its own limit, 100, makes longer ones unknown."""


_SPANNING = (
    "tokens may span words: the pre-tokenizer is another one, which cuts at the ends of lines and numbers as before"
)


def train(
    old: TokenizerFile,
    texts: Iterable[str],
    *,
    size: int,
    algorithm: Algorithm = "bpe",
    min_count: int = 2,
    boundary: Literal["pretoken", "none"] = "pretoken",
    max_length: int = 32,
    tell: Callable[[str], None] = lambda line: None,
) -> NewVocabulary:
    """A new vocabulary of at most `size` tokens, and the rows of the old one that spell them.

    Args:
        old: whose stages and added tokens stay.
        texts: the corpus.
        size: of the vocabulary, added tokens and bytes included.
        algorithm: `bpe`; `unigram`; `longest-match`, the tokens of a BPE of that size, found from the left without
            merges, as in WordPiece without marks.
        min_count: pairs seen less often are not merged.
        boundary: what no token goes beyond: the words that the old stages cut, or, with `none`, lines; of `bpe`.
        max_length: with `boundary="none"`, most characters of a token, in the alphabet of the vocabulary.
        tell: shows progress.

    Raises:
        UsageError: the size has no room for the added tokens and the 256 bytes.
        Unsupported: WordPiece tokenizers, whose stages cannot write every text; Unigram on a byte-level pipeline, and
            longest match on another.
        InputError: the corpus has nothing to train on.
    """
    added = added_entries(old)
    first = [str(entry["content"]) for entry in sorted(added, key=lambda entry: int(entry["id"]))]
    unknown = old.unknown or ("<unk>" if algorithm == "unigram" else None)
    if unknown is not None and unknown not in first:
        first.append(unknown)
    _refuse(old, algorithm)
    whole = boundary == "none"
    stages = TokenizerFile.parse(line_stages(old), old.label) if whole else old
    alphabet = [*CHARACTERS.values()] if old.spelling == "bytes" else [byte_piece(byte) for byte in range(256)]
    least = len(first) + len(alphabet)
    if size <= least:
        raise UsageError(
            "the vocabulary has no room for words", where="size", found=size,
            expected=f"more than {least}: {len(first)} added tokens and 256 bytes", remedy="raise it",
        )  # fmt: skip
    tell(f"training a vocabulary of {size} tokens")
    longest = max_length if whole else None
    trained = _trained(stages, short_lines(texts) if whole else texts, size - least, algorithm, min_count, longest)
    tokens = list(dict.fromkeys([*alphabet, *trained.tokens]))[: size - len(first)]
    if len(tokens) <= len(alphabet):
        raise InputError("the corpus has nothing to merge", where="corpus", remedy="give more text")
    ids = place({token: old.ids.get(token, size) for token in first}, tokens)
    merges = [pair for pair in trained.merges if {*pair, "".join(pair)} <= ids.keys()]
    new = assemble(_stages(stages, algorithm), ids, merges=merges, scores=trained.scores, added=added, unknown=unknown)
    speller = Speller(old)
    origins = speller.origins(new, len(ids))
    for token in first:
        if token in old.ids:
            origins[ids[token]] = Origin(kept=old.ids[token])
    figures = {"algorithm": algorithm, "boundary": boundary, "tokens": len(ids)}
    return NewVocabulary(new, origins, figures, (_SPANNING,) if whole else ())


def _refuse(old: TokenizerFile, algorithm: Algorithm) -> None:
    if old.spelling == "words":
        raise Unsupported(
            "a WordPiece tokenizer cannot write every text, so no vocabulary is trained for its stages",
            where=old.label, remedy='extend it, or take a donor: vocabulary = "replace-donor"',
        )  # fmt: skip
    needed = {"unigram": "pieces", "longest-match": "bytes"}.get(algorithm, old.spelling)
    if needed != old.spelling:
        names = {"pieces": "SentencePiece", "bytes": "byte-level"}
        raise Unsupported(f"{algorithm} needs a {names[needed]} pipeline", where=old.label,
                          found=names[old.spelling], remedy='use algorithm = "bpe"')  # fmt: skip


class _Trained:
    """What a trainer found, in its order."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        model = document["model"]
        self.scores: dict[str, float] = {}
        if isinstance(model["vocab"], list):
            self.scores = _settled({str(piece): float(score) for piece, score in model["vocab"]})
            self.tokens = list(self.scores)
        else:
            self.tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        pairs = [entry.split(" ") if isinstance(entry, str) else entry for entry in model.get("merges", ())]
        self.merges: list[tuple[str, str]] = [(left, right) for left, right in pairs]


def _settled(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores of pieces, the likeliest first, without what the trainer leaves to chance.

    It sums in an order that differs from run to run, which shows in the eleventh digit or so; and it gives characters
    that it would have left out the lowest score, one 10⁻⁴ above the other, in such an order: here in their own.
    """
    rounded = {piece: round(score, _DIGITS) for piece, score in scores.items()}
    lowest = min(rounded.values(), default=0.0)
    steps = ((piece, (score - lowest) / _STEP) for piece, score in rounded.items() if len(piece) == 1)
    kept = {piece: round(step) for piece, step in steps if abs(step - round(step)) < _STEP_MARGIN}
    run = next(number for number in count() if number not in kept.values())
    late = sorted(piece for piece, step in kept.items() if step < run)
    rounded |= dict(zip(late, sorted(rounded[piece] for piece in late), strict=True))
    return dict(sorted(rounded.items(), key=lambda item: (-item[1], item[0])))


def _trained(
    old: TokenizerFile, texts: Iterable[str], size: int, algorithm: Algorithm, min_count: int, longest: int | None
) -> _Trained:
    """What the library's trainer finds; `longest` is the most characters of a token."""
    from tokenizers import models, pre_tokenizers, trainers

    made = old.new_backend()
    made.post_processor = None
    if algorithm == "unigram":
        made.model = models.Unigram()
        trainer: Any = trainers.UnigramTrainer(vocab_size=size, show_progress=False, special_tokens=[])
    else:
        made.model = models.BPE()
        letters = [*CHARACTERS.values()] if old.spelling == "bytes" else []
        whole = size + len(letters)
        trainer = trainers.BpeTrainer(
            vocab_size=whole, min_frequency=min_count, show_progress=False, initial_alphabet=letters, special_tokens=[],
            max_token_length=None if longest is None else longest + 1,  # it stops below
        )  # fmt: skip
    if made.pre_tokenizer is None:
        # No token is to span words, which nothing but the mark of a space tells apart here.
        made.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    made.train_from_iterator(texts, trainer)
    return _Trained(json.loads(made.to_str()))


def _stages(old: TokenizerFile, algorithm: Algorithm) -> TokenizerFile:
    """The old file with a model of the new kind, still without its vocabulary."""
    document = copy.deepcopy(dict(old.document))
    settings: dict[str, Any] = {"unk_token": old.unknown, "fuse_unk": False, "byte_fallback": old.spelling == "pieces"}
    if algorithm == "bpe":
        document["model"] = {
            "type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "ignore_merges": False, "vocab": {}, "merges": [], **settings,
        }  # fmt: skip
    elif algorithm == "unigram":
        document["model"] = {"type": "Unigram", "unk_id": None, "vocab": [], "byte_fallback": True}
    else:
        document["model"] = {
            "type": "WordPiece", "unk_token": old.unknown or "", "continuing_subword_prefix": "",
            "max_input_chars_per_word": _LONGEST_WORD, "vocab": {},
        }  # fmt: skip
    if old.spelling == "pieces" and "ByteFallback" not in json.dumps(document.get("decoder")):
        decoders = [{"type": "ByteFallback"}, *([document["decoder"]] if document.get("decoder") else [])]
        document["decoder"] = {"type": "Sequence", "decoders": decoders}
    return TokenizerFile.parse(document, old.label)
