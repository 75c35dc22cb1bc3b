"""Texts as tokens, and tokens merged inside the parts that no merge leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding, Tokenizer

from regraft.plugins.tokenizer_retrofit.portable.merging import Word, merge_words
from regraft.plugins.tokenizer_retrofit.portable.spelling import Spelling

Texts = Sequence[str] | Sequence[Sequence[str]]

_BLANKS = b" \n\t"


@dataclass(frozen=True)
class Token:
    """A token of the tokenizer, or several that became one.

    Args:
        data: its bytes, as the tokenizer normalises the text; none for tokens that it puts around texts.
        ids: of the tokenizer's tokens that it is made of.
        start, end: characters of the text; where words were given, of the word.
        first: index of the first of those tokens in the text.
        word: the pre-token, or given word, that it stands in; None outside of all.
        free: whether it may be merged: no special and no unknown token.
    """

    data: bytes
    ids: tuple[int, ...]
    start: int
    end: int
    first: int
    word: int | None
    free: bool = True


class Merger:
    """Cuts texts and merges tokens.

    Args:
        tokenizer: of the checkpoint; its own padding and truncation are switched off.
        policy: of policy.json.
    """

    def __init__(self, tokenizer: Tokenizer, policy: Mapping[str, Any]) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.policy = dict(policy)
        self.spelling = Spelling(tokenizer, policy["spelling"])
        self.unknown = tokenizer.token_to_id(policy["unknown"]) if policy["unknown"] is not None else None
        self.added = {i: token.content.encode() for i, token in tokenizer.get_added_tokens_decoder().items()}

    def valid(self, data: bytes) -> bool:
        """Whether a token may have these bytes: blanks stand at its beginning only, unless it is all blanks."""
        longest = self.policy["max_token_bytes"]
        if b"\n\n" in data or (longest is not None and len(data) > longest):
            return False
        if any(byte in _BLANKS for byte in data[1:]) and data.strip(_BLANKS):
            return False
        if self.policy["boundary"] == "word" and len(data.decode(errors="replace").split()) != 1:
            return False
        return bool(self.spelling.ids(data))

    def cut(self, texts: Texts, *, special: bool = True, max_length: int | None = None) -> list[list[Token]]:
        """The tokenizer's own tokens of texts, or of texts that are cut into words.

        Raises:
            ValueError: one string is given in place of a list, or both texts and words are; there is no room for text.
        """
        if isinstance(texts, str) or len({isinstance(text, str) for text in texts}) > 1:
            raise ValueError("give a list of texts, or a list of texts that are all cut into words")
        if max_length is None:
            self.tokenizer.no_truncation()
        else:
            least = max(1, self.tokenizer.num_special_tokens_to_add(False) if special else 1)
            if max_length < least:  # the tokenizer would cut nothing off
                raise ValueError(f"max_length is {max_length}, and {least} at the least")
            self.tokenizer.enable_truncation(max_length)
        given = [text if isinstance(text, str) else list(text) for text in texts]
        worded = bool(given) and not isinstance(given[0], str)
        cut = self.tokenizer.encode_batch(given, is_pretokenized=worded, add_special_tokens=special)
        return [list(self._tokens(one, text)) for one, text in zip(cut, given, strict=True)]

    def _tokens(self, cut: Encoding, text: str | list[str]) -> Iterator[Token]:
        whole = self.policy["boundary"] == "word" and isinstance(text, str)
        rows = zip(cut.ids, cut.offsets, cut.word_ids, cut.special_tokens_mask, strict=True)
        for place, (index, (start, end), word, around) in enumerate(rows):
            data, fixed = self.spelling.data.get(index, b""), False
            if around or index in self.added:
                data, fixed = b"" if around else self.added[index], True
            elif index == self.unknown:
                part = text if isinstance(text, str) else text[word or 0]
                data, fixed = part[start:end].encode("utf-8", "surrogatepass"), True
            where = 0 if whole and word is not None else word
            yield Token(data, (index,), start, end, place, where, not fixed and bool(data))

    def merged(self, cut: Sequence[list[Token]], merges: int, scope: str) -> list[list[Token]]:
        """The texts after so many merges for all of them (`batch`), or for each (`example`)."""
        groups = [cut] if scope == "batch" else [[text] for text in cut]
        found = []
        for group in groups:
            parts = [parts_of(text) for text in group]
            became, _ = merge_words(self.words(parts), merges, min_count=self.policy["min_count"], valid=self.valid)
            found += [[token for part in text for token in _regroup(part, became)] for text in parts]
        return found

    @staticmethod
    def words(parts: Iterable[Iterable[list[Token]]]) -> Counter[Word]:
        """How often each sequence of tokens stands in texts, by their bytes."""
        return Counter(_key(part) for text in parts for part in text if part[0].free)


def parts_of(text: Iterable[Token]) -> list[list[Token]]:
    """A text in the parts that no merge leaves; a token that is never merged is a part of its own.

    Parts end with a word, and before a blank: a token has blanks at its beginning only, or is all blanks.
    """
    parts: list[list[Token]] = []
    for token in text:
        last = parts[-1][-1] if parts else None
        if last is None or _apart(last, token):
            parts.append([])
        parts[-1].append(token)
    return parts


def _apart(left: Token, right: Token) -> bool:
    if not left.free or not right.free or left.word != right.word:
        return True
    return not right.data[:1].strip(_BLANKS) and bool((left.data + right.data).strip(_BLANKS))


def _key(part: Iterable[Token]) -> Word:
    return tuple(token.data for token in part)


def _regroup(part: list[Token], became: Mapping[Word, list[bytes]]) -> Iterator[Token]:
    if not part[0].free:
        yield from part
        return
    rest = iter(part)
    for data in became[_key(part)]:
        taken = [next(rest)]
        while sum(len(token.data) for token in taken) < len(data):
            taken.append(next(rest))
        ids = tuple(index for token in taken for index in token.ids)
        yield Token(data, ids, taken[0].start, taken[-1].end, taken[0].first, taken[0].word)
