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

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regraft.plugins.tokenizer_retrofit.portable.composing import Composer, open_source
from regraft.plugins.tokenizer_retrofit.portable.cutting import Merger, Texts, Token
from regraft.plugins.tokenizer_retrofit.portable.opening import open_policy

IGNORED = -100
"""Label of padding, of tokens around texts, and of tokens that go on with a word."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What a model reads.

    Args:
        tokens: of each text, without padding.
        inputs_embeds: [texts, length, d].
        attention_mask: [texts, length].
        position_ids: [texts, length], as the model counts places; 0 or more for padding.
        labels: [texts, length] where labels were given.
        positioned: whether the model takes position_ids.
    """

    tokens: list[list[Token]]
    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor | None = None
    positioned: bool = False

    def inputs(self) -> dict[str, torch.Tensor]:
        """The arguments of a model; places are among them where padding stands in front, which a model would count."""
        found = {"inputs_embeds": self.inputs_embeds, "attention_mask": self.attention_mask}
        if self.positioned and not bool(self.attention_mask[:, :1].all()):
            found["position_ids"] = self.position_ids
        return found if self.labels is None else {**found, "labels": self.labels}

    @property
    def token_bytes(self) -> list[list[bytes]]:
        """The bytes of each token."""
        return [[token.data for token in text] for text in self.tokens]

    @property
    def offsets(self) -> list[list[tuple[int, int]]]:
        """Beginning and end of each token in its text, in characters."""
        return [[(token.start, token.end) for token in text] for text in self.tokens]


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
        ValueError: the policy is not for this tokenizer, or has no table of reductions; the composer's file is missing,
            or not for this model.
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
        opened = open_policy("dynamic_tokenization", self.folder)
        policy = opened.policy
        self.merger = Merger(opened.tokenizer, policy)
        source = open_source(policy, opened.folder / "composer.safetensors", self.model)
        self.composer = Composer(self.model.get_input_embeddings(), self.merger.spelling, source, self.cache_rows)
        self.positioned, self.first_place = _places(self.model)
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
            ValueError: there are more or fewer labels; `texts` is one string, or mixes texts and words; `max_length`
                leaves no room for text.
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
        positions = (mask.cumsum(1) - 1).clamp(min=0) + self.first_place
        return Batch(tokens, embeds, mask, positions, None if marks is None else labels, self.positioned)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], *, add_special_tokens: bool = True, **options: Any) -> torch.Tensor:
        """Ids of answers to merged prompts, in the tokenizer's own tokens; `options` are those of `model.generate`.

        Raises:
            ValueError: the policy pads on the right, as for encoders; there is no prompt, or one without a token.
        """
        if self.merger.policy["padding"] != "left":
            raise ValueError("the policy is for encoders: they do not generate")
        batch = self.encode_batch(prompts, add_special_tokens=add_special_tokens)
        if not batch.tokens or not all(batch.tokens):
            raise ValueError("there is no prompt, or one that has no token")
        # generate finds places by itself, and moves them on from token to token.
        embeds, mask = batch.inputs_embeds, batch.attention_mask
        found: torch.Tensor = self.model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
        return found

    @torch.no_grad()
    def score(self, prompt: str, continuation: str) -> tuple[float, int]:
        """Bits of a continuation in the tokenizer's own tokens behind a merged prompt, and its bytes.

        The text is cut whole, since some tokenizers cut the beginning of a text in another way than its inside; tokens
        that the tokenizer puts behind texts are left out.

        Raises:
            ValueError: the policy is for encoders; the prompt has no token; the prompt ends inside a token of the text.
        """
        if self.merger.policy["padding"] != "left":
            raise ValueError("the policy is for encoders: they do not say what comes next")
        before, whole = self.merger.cut([prompt, prompt + continuation])
        behind = _behind(whole)
        before, whole = before[: len(before) - behind], whole[: len(whole) - behind]
        own = [index for token in whole[len(before) :] for index in token.ids]
        if not before:
            raise ValueError("the prompt has no token that a continuation could stand behind")
        if [token.ids for token in before] != [token.ids for token in whole[: len(before)]]:
            raise ValueError(
                f"the tokenizer cuts the end of the prompt, {prompt[-20:]!r}, in another way with the continuation, "
                f"{continuation[:20]!r}, behind it: end the prompt where a token ends, as in front of a blank"
            )
        assert self.merges is not None
        assert self.scope is not None
        read = self._padded(self.merger.merged([before], self.merges, self.scope), None).inputs_embeds
        ids = torch.tensor([own], dtype=torch.long, device=read.device)
        embeds = torch.cat([read, self.composer.embeddings(ids)], dim=1)
        logits = self.model(inputs_embeds=embeds).logits[0, read.shape[1] - 1 : -1].float()
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


def _behind(text: Sequence[Token]) -> int:
    """How many tokens the tokenizer puts behind a text; none can be told from those in front where it is empty."""
    placed = (n for n, token in enumerate(reversed(text)) if token.data or token.word is not None)
    return next(placed, 0)


def _places(model: Any) -> tuple[bool, int]:
    """Whether a model takes position_ids, and its number of the first place: some leave the first ones to padding."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = hasattr(inner, "forward") and "position_ids" in inspect.signature(inner.forward).parameters
    named = inner.named_modules() if isinstance(inner, torch.nn.Module) else ()
    paddings = (getattr(part, "padding_idx", None) for name, part in named if name.endswith("position_embeddings"))
    return taken, next((padding + 1 for padding in paddings if padding is not None), 0)
