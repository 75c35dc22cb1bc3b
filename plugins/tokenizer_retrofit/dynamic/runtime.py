"""Dynamic tokenization: texts in fewer and longer tokens, chosen anew for every batch or text.

Feher, Vulić and Minixhofer, Dynamic Tokenization (arXiv 2411.18553). Tokens that stand side by side most often in a
batch are merged; a merged token enters the model as one embedding, composed of rows that the model has.

    import sys
    sys.path.insert(0, "CHECKPOINT/dynamic_tokenization")
    from runtime import DynamicTokenization

    dynamic = DynamicTokenization(model)                # a transformers model, loaded from CHECKPOINT as ever
    model(**dynamic.encode_batch(texts).inputs())       # encoders
    dynamic.generate(prompts, max_new_tokens=50)        # decoders: merged prompts, ordinary tokens as answers

This file stands beside policy.json in a checkpoint and needs torch, tokenizers and safetensors alone.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Encoding, Tokenizer

FORMAT = 1
IGNORED = -100
"""Label of padding, of tokens around texts, and of tokens that go on with a word."""

Word = tuple[bytes, ...]
Pair = tuple[bytes, bytes]
Texts = Sequence[str] | Sequence[Sequence[str]]

_BLANKS = b" \n\t"
_SPACE, _CONTINUES = "\u2581", "##"


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


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model reads.

    Args:
        tokens: of each text, without padding.
        inputs_embeds: [texts, length, d].
        attention_mask: [texts, length].
        position_ids: [texts, length]; for decoders whose texts differ in length.
        labels: [texts, length] where labels were given.
    """

    tokens: list[list[Token]]
    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None = None

    def inputs(self) -> dict[str, torch.Tensor]:
        """The arguments of a model that finds positions itself."""
        found = {"inputs_embeds": self.inputs_embeds, "attention_mask": self.attention_mask}
        return found if self.labels is None else {**found, "labels": self.labels}

    @property
    def token_bytes(self) -> list[list[bytes]]:
        """The bytes of each token."""
        return [[token.data for token in text] for text in self.tokens]

    @property
    def offsets(self) -> list[list[tuple[int, int]]]:
        """Beginning and end of each token in its text, in characters."""
        return [[(token.start, token.end) for token in text] for text in self.tokens]


def merge_words(
    words: Mapping[Word, int], most: int | None, *, min_count: int, valid: Callable[[bytes], bool]
) -> tuple[dict[Word, list[bytes]], list[int]]:
    """Merge the most frequent valid pair, again and again; among pairs as frequent, that whose bytes sort first.

    A pair is counted wherever it stands, also where two overlap, and merged from left to right without overlap.

    Args:
        words: how often each sequence of tokens stands in the batch; nothing is merged across its ends.
        most: merges; None goes on until no pair is left.
        min_count: pairs that stand there less often are left alone.
        valid: whether a token may have these bytes.

    Returns:
        What each word becomes, and how many tokens each merge saved.
    """
    table = _Pairs(words, min_count, valid)
    saved: list[int] = []
    while (most is None or len(saved) < most) and (pair := table.best()) is not None:
        saved.append(table.merge(pair))
    return dict(zip(words, table.words, strict=True)), saved


class _Pairs:
    """Words, how often each pair stands in them, and a heap of pairs; a merge touches only words that have the pair."""

    def __init__(self, words: Mapping[Word, int], min_count: int, valid: Callable[[bytes], bool]) -> None:
        self.words = [list(word) for word in words]
        self.counts = list(words.values())
        self.min_count = min_count
        self.valid = valid
        self.pairs: Counter[Pair] = Counter()
        self.where: dict[Pair, set[int]] = defaultdict(set)
        self.heap: list[tuple[int, bytes, Pair]] = []
        for number, word in enumerate(self.words):
            self._count(word, number, 1)
        for pair in self.pairs:
            self._offer(pair)

    def _count(self, word: list[bytes], number: int, sign: int) -> None:
        for pair in pairwise(word):
            self.pairs[pair] += sign * self.counts[number]
            if sign > 0:
                self.where[pair].add(number)

    def _offer(self, pair: Pair) -> None:
        joined = pair[0] + pair[1]
        if self.pairs[pair] >= self.min_count and self.valid(joined):
            heapq.heappush(self.heap, (-self.pairs[pair], joined, pair))

    def best(self) -> Pair | None:
        """The next pair; an entry whose count has sunk is put back with the true one."""
        while self.heap:
            negative, _, pair = heapq.heappop(self.heap)
            if self.pairs[pair] == -negative:
                return pair
            if self.pairs[pair] < -negative:
                self._offer(pair)
        return None

    def merge(self, pair: Pair) -> int:
        """Join the pair everywhere; the number of tokens that this saves."""
        joined, saved = pair[0] + pair[1], 0
        changed: set[Pair] = set()
        for number in self.where.pop(pair):
            old = self.words[number]
            new = _joined(old, pair, joined)
            if len(new) == len(old):
                continue
            saved += self.counts[number] * (len(old) - len(new))
            self._count(old, number, -1)
            self._count(new, number, 1)
            changed.update(come for come in pairwise(new) if joined in come)
            self.words[number] = new
        for come in changed:
            self._offer(come)
        return saved


def _joined(word: Iterable[bytes], pair: Pair, joined: bytes) -> list[bytes]:
    out: list[bytes] = []
    held: bytes | None = None
    for part in word:
        if held == pair[0] and part == pair[1]:
            out.append(joined)
            held = None
            continue
        if held is not None:
            out.append(held)
        held = part
    return out if held is None else [*out, held]


class Spelling:
    """Bytes of the tokenizer's tokens, and tokens of bytes.

    Args:
        tokenizer: as `tokenizers` runs it.
        kind: `bytes`: byte-level. `pieces`: SentencePiece. `words`: WordPiece, where a word begins with a space.
    """

    def __init__(self, tokenizer: Tokenizer, kind: str) -> None:
        self.kind = kind
        self.model = tokenizer.model
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in plain]
        self.characters = {byte: chr(byte) for byte in plain}
        self.characters |= {byte: chr(256 + place) for place, byte in enumerate(others)}
        self.bytes = {character: byte for byte, character in self.characters.items()}
        self.byte_pieces = {f"<0x{byte:02X}>": byte for byte in range(256)} if kind == "pieces" else {}
        added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[0] in self.byte_pieces, item[1]))
        self.vocab = {token: index for token, index in vocabulary if token not in added}
        self.data = {index: self._read(token) for token, index in self.vocab.items()}
        self.own: dict[bytes, int] = {}
        for index, data in self.data.items():
            self.own.setdefault(data, index)
        self.known: dict[bytes, tuple[int, ...]] = {}

    def _read(self, token: str) -> bytes:
        if self.kind == "bytes":
            return bytes(map(self.bytes.__getitem__, token)) if all(map(self.bytes.__contains__, token)) else b""
        if token in self.byte_pieces:
            return bytes([self.byte_pieces[token]])
        if self.kind == "pieces":
            return token.replace(_SPACE, " ").encode("utf-8", "surrogatepass")
        inside = token.startswith(_CONTINUES) and len(token) > len(_CONTINUES)
        return (token[len(_CONTINUES) :] if inside else " " + token).encode("utf-8", "surrogatepass")

    def ids(self, data: bytes) -> tuple[int, ...]:
        """The token that has these bytes, or those that the tokenizer's model spells them with; () if it cannot."""
        if data not in self.known:
            own = self.own.get(data)
            found = (own,) if own is not None else tuple(self._spell(data))
            self.known[data] = found if b"".join(self.data.get(index, b"") for index in found) == data else ()
        return self.known[data]

    def _spell(self, data: bytes) -> Iterator[int]:
        if self.kind == "bytes":
            return (token.id for token in self.model.tokenize("".join(map(self.characters.__getitem__, data))))
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return (self.vocab.get(f"<0x{byte:02X}>", -1) for byte in data)
        if self.kind == "words":
            return self._longest(text)
        return (token.id for token in self.model.tokenize(text.replace(" ", _SPACE)))

    def _longest(self, text: str) -> Iterator[int]:
        inside, text = not text.startswith(" "), text.removeprefix(" ")
        start = 0
        while start < len(text):
            mark = _CONTINUES if inside or start else ""
            stops = range(len(text), start, -1)
            stop = next((end for end in stops if mark + text[start:end] in self.vocab), None)
            if stop is None:
                return
            yield self.vocab[mark + text[start:stop]]
            start = stop


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
        """The tokenizer's own tokens of texts, or of texts that are cut into words."""
        if max_length is None:
            self.tokenizer.no_truncation()
        else:
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


class Composer:
    """Embeddings of merged tokens: the row of the token that has the same bytes, or one of a table, or a mean of rows.

    Args:
        embeddings: the model's module.
        spelling: of its tokenizer.
        table: rows by bytes.
        capacity: rows that are remembered; those of the batch at hand are never dropped.
    """

    def __init__(
        self, embeddings: torch.nn.Module, spelling: Spelling, table: Mapping[bytes, torch.Tensor], capacity: int
    ) -> None:
        self.embeddings = embeddings
        self.spelling = spelling
        self.table = table
        self.capacity = capacity
        self.cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.stamp: tuple[object, ...] = ()

    def rows(self, tokens: Iterable[bytes]) -> dict[bytes, torch.Tensor]:
        """The row [d] of each token; remembered until the embeddings change."""
        weight: Any = self.embeddings.weight
        version = None if weight.is_inference() else weight._version
        stamp = (weight.data_ptr(), weight.dtype, weight.device, version)
        if stamp != self.stamp:
            self.cache.clear()
            self.stamp = stamp
        wanted = dict.fromkeys(tokens)
        for data in wanted:
            if data not in self.cache:
                self.cache[data] = self._row(data, weight)
            self.cache.move_to_end(data)
        while len(self.cache) > max(self.capacity, len(wanted)):
            self.cache.popitem(last=False)
        return {data: self.cache[data] for data in wanted}

    def _row(self, data: bytes, weight: torch.Tensor) -> torch.Tensor:
        ids = self.spelling.ids(data)
        if len(ids) > 1 and data in self.table:
            row = self.table[data].to(weight.device, torch.float32) * getattr(self.embeddings, "embed_scale", 1.0)
            return row.to(weight.dtype)
        rows: torch.Tensor = self.embeddings(torch.tensor(ids, device=weight.device))
        return rows[0] if len(ids) == 1 else rows.float().mean(0).to(rows.dtype)


@dataclass(eq=False)
class DynamicTokenization:
    """Reads texts in merged tokens.

    Args:
        model: of transformers, or anything that has `get_input_embeddings`.
        folder: of the checkpoint; None takes the one that this file stands in.
        merges: for a batch or text; None takes the policy's.
        reduction: in place of merges, 0 to 1: of the way from the tokenizer's tokens to one token a word.
        scope: `batch` or `example`; None takes the policy's.
        cache_rows: composed rows that are remembered.

    Raises:
        ValueError: the policy is not for this tokenizer, or has no table of reductions; the table of rows is missing.
    """

    model: Any
    folder: Path | str | None = None
    merges: int | None = None
    reduction: float | None = None
    scope: str | None = None
    cache_rows: int = 5000
    merger: Merger = field(init=False)
    composer: Composer = field(init=False)

    def __post_init__(self) -> None:
        root = Path(__file__).resolve().parent.parent if self.folder is None else Path(self.folder)
        own = root / "dynamic_tokenization"
        policy, text = json.loads((own / "policy.json").read_text()), (root / "tokenizer.json").read_bytes()
        if policy["format"] != FORMAT:
            raise ValueError(f"policy.json has format {policy['format']}; this file reads {FORMAT}")
        if hashlib.sha256(text).hexdigest() != policy["tokenizer_sha256"]:
            raise ValueError("tokenizer.json has changed since the policy was made: run dynamic-tokenization again")
        self.merger = Merger(Tokenizer.from_str(text.decode()), policy)
        table = _read_table(own / "composer.safetensors") if policy["composer"] == "table" else {}
        self.composer = Composer(self.model.get_input_embeddings(), self.merger.spelling, table, self.cache_rows)
        self.scope = self.scope or policy["scope"]
        if self.scope not in ("batch", "example"):
            raise ValueError(f"scope is batch or example, not {self.scope!r}")
        if self.reduction is not None:
            self.merges = merges_for(policy["reductions"], self.reduction)
        elif self.merges is None:
            self.merges = int(policy["merges"])

    @torch.no_grad()
    def encode_batch(
        self,
        texts: Texts,
        *,
        labels: Sequence[Sequence[int]] | None = None,
        label_every_token: bool = False,
        add_special_tokens: bool = True,
        max_length: int | None = None,
    ) -> Batch:
        """Texts as embeddings of merged tokens, padded on the policy's side.

        Args:
            texts: each one text, or each cut into words.
            labels: one for each of the tokenizer's tokens, those around texts included; where words are given, one for
                each word. A merged token has the label of its leftmost part.
            label_every_token: of words: also tokens that go on with one have its label.
            add_special_tokens: put the tokenizer's tokens around texts.
            max_length: the tokenizer's tokens of a text, before merging; the rest is cut off.

        Raises:
            ValueError: there are more or fewer labels.
        """
        cut = self.merger.cut(texts, special=add_special_tokens, max_length=max_length)
        assert self.merges is not None
        assert self.scope is not None
        tokens = self.merger.merged(cut, self.merges, self.scope)
        worded = bool(texts) and not isinstance(texts[0], str)
        if labels is None:
            return self._padded(tokens, None)
        sizes = [len(text) for text in (texts if worded else cut)]
        if [len(own) for own in labels] != sizes:
            raise ValueError(
                f"there are {sizes} {'words' if worded else 'tokens'}, and {list(map(len, labels))} labels"
            )
        marks = [list(_labels(*both, worded, label_every_token)) for both in zip(tokens, labels, strict=True)]
        return self._padded(tokens, marks)

    def _padded(self, tokens: list[list[Token]], marks: list[list[int]] | None) -> Batch:
        weight: Any = self.composer.embeddings.weight
        length = max(map(len, tokens), default=0)
        left = self.merger.policy["padding"] == "left"
        ids = torch.full((len(tokens), length), self.merger.policy["pad_token_id"])
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        merged: list[tuple[int, int, bytes]] = []
        for row, text in enumerate(tokens):
            start = length - len(text) if left else 0
            mask[row, start : start + len(text)] = 1
            ids[row, start : start + len(text)] = torch.tensor([token.ids[0] for token in text], dtype=ids.dtype)
            merged += [(row, start + n, token.data) for n, token in enumerate(text) if len(token.ids) > 1]
            if marks is not None:
                labels[row, start : start + len(text)] = torch.tensor(marks[row], dtype=ids.dtype)
        ids, mask, labels = (one.to(weight.device) for one in (ids, mask, labels))
        embeds: torch.Tensor = self.composer.embeddings(ids)
        if merged:
            rows = self.composer.rows(data for _, _, data in merged)
            places = [torch.tensor(axis, device=weight.device) for axis in zip(*(m[:2] for m in merged), strict=True)]
            embeds[places[0], places[1]] = torch.stack([rows[data] for _, _, data in merged]).to(embeds.dtype)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return Batch(tokens, embeds, mask, positions, None if marks is None else labels)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], *, add_special_tokens: bool = True, **options: Any) -> torch.Tensor:
        """Ids of answers to merged prompts, in the tokenizer's own tokens; `options` are those of `model.generate`.

        Raises:
            ValueError: the policy pads on the right, as for encoders.
        """
        if self.merger.policy["padding"] != "left":
            raise ValueError("the policy is for encoders: they do not generate")
        batch = self.encode_batch(prompts, add_special_tokens=add_special_tokens)
        found: torch.Tensor = self.model.generate(**batch.inputs(), **options)
        return found

    @torch.no_grad()
    def score(self, prompt: str, continuation: str) -> tuple[float, int]:
        """Bits of a continuation in the tokenizer's own tokens behind a merged prompt, and its bytes.

        Raises:
            ValueError: the prompt has no token.
        """
        before = self.encode_batch([prompt])
        if not before.tokens[0]:
            raise ValueError("the prompt has no token that a continuation could stand behind")
        own = self.merger.tokenizer.encode(continuation, add_special_tokens=False).ids
        ids = torch.tensor([own], dtype=torch.long, device=before.inputs_embeds.device)
        embeds = torch.cat([before.inputs_embeds, self.composer.embeddings(ids)], dim=1)
        logits = self.model(inputs_embeds=embeds).logits[0, before.inputs_embeds.shape[1] - 1 : -1].float()
        nats = torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum").item()
        return nats / math.log(2), len(continuation.encode())


def merges_for(reductions: Sequence[Sequence[float]], target: float) -> int:
    """The fewest merges that reduced the policy's corpus by `target`, 0 to 1.

    Raises:
        ValueError: it was measured on no corpus, or the target is not in the table.
    """
    found = next((int(merges) for merges, reduction, *_ in reductions if reduction >= target - 1e-9), None)
    if found is None:
        raise ValueError("policy.json has no reduction that large: set merges, or run the step with a corpus")
    return found


def _labels(text: Sequence[Token], own: Sequence[int], worded: bool, every: bool) -> Iterator[int]:
    before: int | None = None
    for token in text:
        if not worded:
            yield own[token.first]
        else:
            labelled = token.word is not None and (every or token.word != before)
            yield own[token.word] if labelled and token.word is not None else IGNORED
        before = token.word


def _read_table(file: Path) -> dict[bytes, torch.Tensor]:
    if not file.is_file():
        raise ValueError(
            f"{file.name} is missing: run dynamic-tokenization again, or set composer to mean in policy.json"
        )
    tensors = load_file(file)
    data, ends = bytes(tensors["bytes"].tolist()), tensors["ends"].tolist()
    return {data[start:end]: row for start, end, row in zip([0, *ends], ends, tensors["rows"], strict=False)}
