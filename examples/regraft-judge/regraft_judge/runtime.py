"""Speculative decoding with a judge (arXiv 2501.19309, 2504.20039). Needs torch, transformers and safetensors alone.

    sys.path.insert(0, "checkpoint/judge")
    from runtime import Judge, generate

    target = AutoModelForCausalLM.from_pretrained("checkpoint")
    draft = AutoModelForCausalLM.from_pretrained("small")
    found = generate(target, draft, ids, Judge.load("checkpoint"), max_new_tokens=200)
    tokenizer.decode(found.ids[0])

The draft model proposes tokens; the target reads them all at once. A token stays if the target would have said it, or
if the judge gives less than `threshold` that the difference matters. At the first other one the target's own token
follows, and the rest of the proposal is thrown away. With threshold 0 the text is the target's greedy one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import DynamicCache


@dataclass(frozen=True)
class Judge:
    """p(matters) = sigmoid(weight · h + bias), of the target's last hidden state h at the drafted token.

    Args:
        weight: [D], fp32.
        bias: a number.
        threshold: tokens with p below it are good enough.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    threshold: float

    @classmethod
    def load(cls, folder: str | Path, threshold: float | None = None) -> Judge:
        """The judge of a checkpoint; `threshold` in place of its own."""
        settings = json.loads((Path(folder) / "judge" / "policy.json").read_text())
        tensors = load_file(Path(folder) / "judge" / "head.safetensors")
        return cls(tensors["weight"][0], tensors["bias"][0], settings["threshold"] if threshold is None else threshold)

    def matters(self, states: torch.Tensor) -> torch.Tensor:
        """p(matters), [tokens].

        Args:
            states: [tokens, D].
        """
        return torch.sigmoid(states.float() @ self.weight.to(states.device) + self.bias.to(states.device))


@dataclass(frozen=True)
class Generated:
    """A text, and what became of the proposals.

    Args:
        ids: prompt and text, [1, tokens].
        rounds: forward passes of the target.
        proposed: tokens that the draft model has proposed.
        agreed: those that the target would have said.
        forgiven: those that stay because the judge says so.
    """

    ids: torch.Tensor
    rounds: int
    proposed: int
    agreed: int
    forgiven: int


class Reader:
    """Reads sequences that begin alike; what it has read before stays in its cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache, self.seen = model, DynamicCache(), torch.empty(1, 0, dtype=torch.long)

    def read(self, ids: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Position of the first token that it had to read; logits and last hidden states from there, [tokens, ...]."""
        common = min(self.seen.shape[1], ids.shape[1] - 1)
        same = int((self.seen[0, :common] == ids[0, :common].cpu()).cumprod(0).sum())
        if surplus := self.seen.shape[1] - same:
            self.cache.crop(-surplus)
        found = self.model(ids[:, same:], past_key_values=self.cache, use_cache=True, output_hidden_states=True)
        self.seen = ids.cpu()
        return same, found.logits[0], found.hidden_states[-1][0]


@torch.inference_mode()
def generate(
    target: Any, draft: Any, ids: torch.Tensor, judge: Judge, *, max_new_tokens: int = 128, draft_tokens: int = 8,
    eos_token_id: int | None = None,
) -> Generated:  # fmt: skip
    """Greedy text of `target`, with what the judge forgives.

    Args:
        target: the checkpoint's model; `draft`: a smaller one with the same vocabulary.
        ids: the prompt, [1, tokens].
        judge: see `Judge.load`.
        max_new_tokens: length of the text.
        draft_tokens: length of a proposal.
        eos_token_id: ends the text; by default that of the target's config.
    """
    end = target.config.eos_token_id if eos_token_id is None else eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    reader, proposer = Reader(target), Reader(draft)
    rounds = proposed = agreed = forgiven = 0
    stop = ids.shape[1] + max_new_tokens
    while ids.shape[1] < stop and (rounds == 0 or ids[0, -1].item() not in ends):
        known = ids.shape[1]
        tried = _propose(proposer, ids, min(draft_tokens, stop - known), ends)
        first, logits, states = reader.read(tried)
        wanted = logits[known - 1 - first :].argmax(-1)
        tokens = tried[0, known:]
        same = wanted[: len(tokens)] == tokens
        good = same | (judge.matters(states[known - first :]) < judge.threshold)
        kept = int(good.cumprod(0).sum())
        rounds, proposed = rounds + 1, proposed + len(tokens)
        agreed, forgiven = agreed + int(same[:kept].sum()), forgiven + int((~same[:kept]).sum())
        ids = tried[:, : known + kept]
        if ids.shape[1] < stop and not (kept and ids[0, -1].item() in ends):
            ids = torch.cat([ids, wanted[kept].view(1, 1)], 1)
    return Generated(ids, rounds, proposed, agreed, forgiven)


def _propose(proposer: Reader, ids: torch.Tensor, count: int, ends: set[int]) -> torch.Tensor:
    for _ in range(count):
        _, logits, _ = proposer.read(ids)
        ids = torch.cat([ids, logits[-1].argmax(-1).view(1, 1)], 1)
        if ids[0, -1].item() in ends:
            break
    return ids
