"""New vocabularies in the plainest code, without regraft, and what texts cost: what the tool is held against.

For byte-level BPE with tied embeddings whose pre-tokenizer cuts digits one by one, as SmolLM2's does.
"""

from __future__ import annotations

import copy
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

Score = tuple[float, int]
"""Bits and bytes of a passage."""


def read(folder: Path) -> tuple[Tokenizer, Any]:
    """The tokenizer as `tokenizers` reads it, and the model in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Tokenizer.from_file(str(folder / "tokenizer.json")), model


def passages(text: str, nbytes: int) -> list[str]:
    """The text in pieces of at most so many bytes, between characters."""
    found = [""]
    for character in text:
        if len((found[-1] + character).encode()) > nbytes:
            found.append("")
        found[-1] += character
    return found


def bits(tokenizer: Tokenizer, model: Any, texts: Iterable[str], prefix: int) -> list[Score]:
    """-Σ log2 p over every token of each text, behind one token that is not counted; and the text's bytes."""
    scores = []
    for text in texts:
        ids = torch.tensor([prefix, *tokenizer.encode(text, add_special_tokens=False).ids])
        with torch.inference_mode():
            said = torch.log_softmax(model(ids[None, :-1]).logits[0].double(), dim=-1)
        nats = -said.gather(1, ids[1:, None]).sum().item()
        scores.append((nats / math.log(2), len(text.encode())))
    return scores


def per_byte(scores: Iterable[Score]) -> float:
    """Bits per byte of passages together."""
    own = list(scores)
    return sum(one for one, _ in own) / sum(size for _, size in own)


def trained(old: Tokenizer, texts: Iterable[str], size: int) -> Tokenizer:
    """A byte-level BPE vocabulary of the texts; the old special tokens come first, so they keep their ids."""
    new = Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    new.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    new.decoder = decoders.ByteLevel()
    specials = [token for _, token in sorted(old.get_added_tokens_decoder().items())]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    new.train_from_iterator(texts, trainer)
    assert all(new.token_to_id(token.content) == old.token_to_id(token.content) for token in specials)
    return new


def extended(old: Tokenizer, texts: Iterable[str], size: int, min_count: int, longest: int) -> Tokenizer:
    """The old vocabulary with the pairs appended that are the most frequent, one after the other."""
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(word for word, _ in old.pre_tokenizer.pre_tokenize_str(text))
    words = [[token.value for token in old.model.tokenize(word)] for word in seen]
    counts = list(seen.values())
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for number, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += counts[number]
            places[pair].add(number)
    document = json.loads(old.to_str())
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    full = len(vocab) + size
    refused: set[tuple[str, str]] = set()
    while len(vocab) < full:
        count, pair = max((count, pair) for pair, count in pairs.items() if pair not in refused)
        if count < min_count:
            break
        joined = "".join(pair)
        if joined in vocab or len(joined) > longest:
            refused.add(pair)
            continue
        vocab[joined] = len(vocab)
        merges.append(list(pair))
        for number in places[pair].copy():
            for one in pairwise(words[number]):
                pairs[one] -= counts[number]
            words[number] = merged(words[number], pair)
            for one in pairwise(words[number]):
                pairs[one] += counts[number]
                places[one].add(number)
    return Tokenizer.from_str(json.dumps(document))


def merged(word: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """The word with the pair joined, from the left."""
    made: list[str] = []
    rest = list(word)
    while rest:
        take = 2 if tuple(rest[:2]) == pair else 1
        made.append("".join(rest[:take]))
        rest = rest[take:]
    return made


def with_vocabulary(model: Any, old: Tokenizer, new: Tokenizer) -> Any:
    """The model with a row for every new token: that of the old token of the same name, or else the mean of the rows
    that spell it, or, where nothing does, the mean of all."""
    table = model.get_input_embeddings().weight.detach()
    rows = torch.empty(new.get_vocab_size(), table.shape[1])
    for token, index in new.get_vocab().items():
        kept = old.token_to_id(token)
        parts = [kept] if kept is not None else [part.id for part in old.model.tokenize(token)]
        rows[index] = table[kept] if kept is not None else table[parts or slice(None)].mean(dim=0)
    made = copy.deepcopy(model)
    made.resize_token_embeddings(len(rows), mean_resizing=False)
    made.get_input_embeddings().weight.data = rows
    made.tie_weights()
    assert made.get_output_embeddings().weight is made.get_input_embeddings().weight
    return made
