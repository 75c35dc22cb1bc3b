"""A very large vocabulary: texts are read, and answers written, in tokens for which the model's tables have no rows.

Feher, Vulić and Minixhofer, Dynamic Tokenization (arXiv 2411.18553): rows of up to a million more tokens stand
beside the model; an index finds the few that may come next, and their logits are computed exactly.

    import sys
    sys.path.insert(0, "CHECKPOINT/large_vocabulary")
    from runtime import LargeVocabulary

    large = LargeVocabulary(model)                      # a transformers model, loaded from CHECKPOINT as ever
    answers = large.generate(prompts, max_new_tokens=50)
    large.decode(answers[0])

This file stands beside policy.json in a checkpoint and needs torch, tokenizers, safetensors and faiss (faiss-cpu).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from regraft.plugins.tokenizer_retrofit.portable.cutting import Merger, Token, parts_of
from regraft.plugins.tokenizer_retrofit.portable.opening import open_policy
from regraft.plugins.tokenizer_retrofit.portable.searching import CandidateHead, Index, Rows, head_bias


@dataclass(frozen=True, eq=False)
class Prompts:
    """What a model reads, padded on the left.

    Args:
        ids: of each text's tokens; from the number of the model's rows on they are appended ones.
        token_bytes: of each text's tokens.
        inputs_embeds: [texts, length, d].
        attention_mask, position_ids: [texts, length].
    """

    ids: list[list[int]]
    token_bytes: list[list[bytes]]
    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


class Lexicon:
    """The appended tokens.

    Args:
        tensors: of tokens.safetensors: `bytes` of all and where each `ends`, and `parts`, the tokenizer's ids that
            spell them, and where these of each end, `part_ends`.
        first: id of the first one.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], first: int) -> None:
        data, ends = bytes(tensors["bytes"].numpy()), tensors["ends"].tolist()
        self.first = first
        self.ids = {data[start:end]: first + n for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False))}
        self.longest = max(map(len, self.ids), default=0)
        self.parts, self.part_ends = tensors["parts"].tolist(), [0, *tensors["part_ends"].tolist()]

    def spelled(self, ids: Sequence[int]) -> list[int]:
        """The same text in the tokenizer's own tokens."""
        found: list[int] = []
        for index in ids:
            place = index - self.first
            found += self.parts[self.part_ends[place] : self.part_ends[place + 1]] if place >= 0 else [index]
        return found

    def joined(self, part: Sequence[Token]) -> Iterator[tuple[int, bytes]]:
        """Ids and bytes of tokens, from the left always the longest run of the tokenizer's that is an appended one."""
        start = 0
        while start < len(part):
            data, best = part[start].data, (start + 1, part[start].ids[0], part[start].data)
            for stop in range(start + 1, len(part) if part[start].free else 0):
                data += part[stop].data
                if len(data) > self.longest:
                    break
                if data in self.ids:
                    best = (stop + 1, self.ids[data], data)
            start = best[0]
            yield best[1:]


@dataclass(eq=False)
class LargeVocabulary:
    """Reads and writes appended tokens.

    Args:
        model: a causal language model of transformers.
        folder: of the checkpoint; None takes the one that this file stands in.
        exact: compute the logits of all rows; needs no faiss.
        probes: lists of the index that are looked through; None takes the policy's.
        candidates: rows whose logits are computed exactly; None takes the policy's.

    Raises:
        ValueError: the policy is not for this tokenizer or model, a file is missing, or faiss is; probes or candidates
            are fewer than one.
    """

    model: Any
    folder: Path | str | None = None
    exact: bool = False
    probes: int | None = None
    candidates: int | None = None
    tokenizer: Tokenizer = field(init=False)
    lexicon: Lexicon = field(init=False)
    merger: Merger = field(init=False)

    def __post_init__(self) -> None:
        opened = open_policy("large_vocabulary", self.folder)
        self.policy, self.tokenizer = opened.policy, opened.tokenizer
        self.merger = Merger(self.tokenizer, self.policy)
        tensors = {}
        for name in ("tokens.safetensors", "rows.safetensors"):
            if not (opened.folder / name).is_file():
                raise ValueError(f"{name} is missing: run large-vocabulary again")
            tensors[name] = load_file(opened.folder / name)
        rows = tensors["rows.safetensors"]
        self.lexicon = Lexicon(tensors["tokens.safetensors"], self.policy["rows"])
        self.embeddings = self.model.get_input_embeddings()
        own = self.model.get_output_embeddings()
        if own is None or len(own.weight) != self.policy["rows"]:
            raise ValueError(f"the policy is for a causal language model with {self.policy['rows']} rows")
        self._check_rows(rows)
        self.inputs = Rows(self.embeddings.weight.detach(), rows["embeddings"])
        head = Rows(own.weight.detach(), rows.get("head", rows["embeddings"]))
        device = own.weight.device
        total = self.policy["rows"] + self.policy["tokens"]
        known = torch.ones(total, dtype=torch.bool)
        known[self.policy["never"]] = False
        probes = self.policy["probes"] if self.probes is None else self.probes
        count = self.policy["candidates"] if self.candidates is None else self.candidates
        if min(probes, count) < 1:
            raise ValueError(f"a search of {probes} lists for {count} candidates finds nothing")
        index = None if self.exact else Index(opened.folder / "index.faiss", probes)
        self.head = CandidateHead(
            head, head_bias(self.model, rows), torch.tensor(self.policy["always"], dtype=torch.long, device=device),
            index, known.nonzero().flatten().to(device), count,
        )  # fmt: skip
        self.arguments = inspect.signature(self.model.forward).parameters

    def _check_rows(self, rows: dict[str, torch.Tensor]) -> None:
        """Warn where the model's rows are no longer those that the appended ones and the index were made from."""
        probed = rows["probe_rows"].float()
        now = self.embeddings.weight.detach()[rows["probe_ids"].to(self.embeddings.weight.device)].float().cpu()
        if not torch.allclose(now, probed, rtol=0.02, atol=1e-3 * float(probed.abs().max())):
            warnings.warn(
                "the embeddings have changed since the rows were made: run large-vocabulary again", stacklevel=4
            )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[list[int], list[bytes]]:
        """Ids and bytes of a text's tokens. Taken apart, they are the tokenizer's own."""
        return self._joined(self.merger.cut([text], special=add_special_tokens)[0])

    def _joined(self, cut: Sequence[Token]) -> tuple[list[int], list[bytes]]:
        pairs = [pair for part in parts_of(cut) for pair in self.lexicon.joined(part)]
        return [index for index, _ in pairs], [data for _, data in pairs]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids, by the tokenizer's decoder."""
        text: str = self.tokenizer.decode(self.lexicon.spelled(ids), skip_special_tokens=skip_special_tokens)
        return text

    @torch.no_grad()
    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., d] what the model reads for ids."""
        rows = self.inputs.take(ids.to(self.embeddings.weight.device))
        scale: Any = getattr(self.embeddings, "embed_scale", None)
        return rows if scale is None else rows * (scale.to(rows.dtype) if isinstance(scale, torch.Tensor) else scale)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> Prompts:
        """Texts as embeddings of the tokens of the large vocabulary.

        Raises:
            ValueError: one string is given in place of a list.
        """
        cut = [self._joined(text) for text in self.merger.cut(texts, special=add_special_tokens)]
        length = max((len(ids) for ids, _ in cut), default=0)
        ids = torch.full((len(cut), length), self.policy["pad_token_id"])
        mask = torch.zeros_like(ids)
        for row, (own, _) in enumerate(cut):
            ids[row, length - len(own) :] = torch.tensor(own, dtype=ids.dtype)
            mask[row, length - len(own) :] = 1
        embeds = self.embed(ids)
        mask = mask.to(embeds.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return Prompts([own for own, _ in cut], [data for _, data in cut], embeds, mask, positions)

    @contextmanager
    def _candidates(self) -> Iterator[CandidateHead]:
        """The model with a head that computes candidates alone."""
        own = self.model.get_output_embeddings()
        self.model.set_output_embeddings(self.head)
        try:
            yield self.head
        finally:
            self.model.set_output_embeddings(own)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        min_p: float = 0.0,
        generator: torch.Generator | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        add_special_tokens: bool = True,
    ) -> list[list[int]]:
        """Ids of answers; the end of the text is not among them.

        Args:
            prompts: texts.
            max_new_tokens: of an answer.
            temperature: of draws among the candidates; 0 takes the likeliest.
            min_p: least probability of a candidate that is drawn, as a share of the likeliest one's.
            generator: of the draws.
            eos_token_id: ids that end an answer; None takes those of the model's generation config.
            add_special_tokens: put the tokenizer's tokens around prompts.

        Raises:
            ValueError: there is no prompt, or one without a token; an id that ends an answer is among the ones never
                written; min_p is no share.
        """
        batch = self.encode_batch(prompts, add_special_tokens=add_special_tokens)
        if not batch.ids or not all(batch.ids):
            raise ValueError("there is no prompt, or one that has no token")
        if not 0 <= min_p <= 1:
            raise ValueError(f"min_p is a share, 0 to 1, and not {min_p}")
        ends = self._ends(eos_token_id)
        if stray := ends - set(self.policy["always"]):
            raise ValueError(
                f"{sorted(stray)} cannot end answers: the policy's special ids are {self.policy['always']}"
            )
        embeds, mask, positions, cache = batch.inputs_embeds, batch.attention_mask, batch.position_ids, None
        answers: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(answers)))
        with self._candidates() as head:
            for _ in range(max_new_tokens):
                given = {"position_ids": positions, "logits_to_keep": 1}
                out = self.model(
                    inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True,
                    **{name: value for name, value in given.items() if name in self.arguments},
                )  # fmt: skip
                places = _picked(head.masked(out.logits), temperature, min_p, generator)
                chosen = head.ids.gather(1, places[:, None])
                for row, index in enumerate(chosen[:, 0].tolist()):
                    if row in running and index in ends:
                        running.discard(row)
                    elif row in running:
                        answers[row].append(index)
                if not running:
                    break
                embeds, cache = self.embed(chosen), out.past_key_values
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                positions = positions[:, -1:] + 1
        return answers

    def _ends(self, given: int | Sequence[int] | None) -> set[int]:
        found = getattr(self.model.generation_config, "eos_token_id", None) if given is None else given
        return set() if found is None else {found} if isinstance(found, int) else set(found)


def _picked(logits: torch.Tensor, temperature: float, min_p: float, generator: torch.Generator | None) -> torch.Tensor:
    """[batch] the place of the candidate that is taken."""
    if temperature <= 0:
        return logits.argmax(-1)
    shares = (logits / temperature).softmax(-1)
    shares = shares.masked_fill(shares < min_p * shares.amax(-1, keepdim=True), 0.0)
    return torch.multinomial(shares, 1, generator=generator)[:, 0]
