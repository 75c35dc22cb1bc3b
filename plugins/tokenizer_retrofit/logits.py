"""What the model says before and after: kept tokens have equal logits, and only tokens that there are get written."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.errors import TransformationError
from regraft.core.training.modes import without_dropout
from regraft.plugins.tokenizer_retrofit.proof import PROBES
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

_MOST_TOKENS = 32
_TOLERANCE = 1e-3
"""Relative, of the norm: products of other shapes may be summed in another order, and a wrong row is far off."""


@dataclass(frozen=True, eq=False)
class KeptLogits:
    """What the model said before the step of texts that are cut alike.

    Args:
        probes: texts, their new ids [T], and the logits [T, kept] of the tokens that are kept.
        kept: new ids of those tokens, in the order of their old ones.
        written: new ids that stand for a token.
    """

    probes: list[tuple[str, torch.Tensor, torch.Tensor]]
    kept: torch.Tensor
    written: Container[int]

    @classmethod
    def of(cls, model: Any, old: TokenizerFile, new: NewVocabulary) -> KeptLogits:
        """By the model before the step, with the old vocabulary."""
        moved = dict(sorted(new.new_id().items()))
        rows = torch.tensor(list(moved))
        probes = []
        for text in PROBES:
            before, after = (
                backend.encode(text, add_special_tokens=False).ids[:_MOST_TOKENS]
                for backend in (old.backend(), new.tokenizer.backend())
            )
            if before and [moved.get(index) for index in before] == after:
                probes.append((text, torch.tensor([after]), _logits(model, torch.tensor([before]), rows)))
        return cls(probes, torch.tensor(list(moved.values())), new.tokenizer.tokens)

    def check(self, model: Any) -> None:
        """By the model after the step, as its rows were made; it must also write a text of tokens that there are.

        Raises:
            TransformationError: a kept token has other logits than before, or an id without a token is the likeliest.
        """
        for text, ids, wanted in self.probes:
            found = _logits(model, ids, self.kept)
            gap, length = float((found - wanted).norm()), float(wanted.norm())
            if not gap <= _TOLERANCE * length:
                raise TransformationError("kept tokens have other logits than before", where=repr(text),
                                          expected=f"a difference below {_TOLERANCE} of their length",
                                          found=f"{gap / max(length, 1e-30):.3g}")  # fmt: skip

        start = self.probes[0][1] if self.probes else self.kept[:1, None]
        for index in _greedy(model, start):
            if index not in self.written:
                raise TransformationError("the model writes an id that is no token", found=f"id {index}",
                                          expected="suppress_tokens in generation_config.json to name it")  # fmt: skip


def _greedy(model: Any, start: torch.Tensor) -> list[int]:
    """The ids that the model goes on with, as transformers generates by the checkpoint's own settings but for chance."""
    ids = start.to(next(model.parameters()).device)
    with torch.no_grad(), without_dropout(model):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=_MOST_TOKENS)
    written: list[int] = found[0, ids.shape[1] :].tolist()
    return written


def _logits(model: Any, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[T, columns], fp32, on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad(), without_dropout(model):
        found: torch.Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return found[0].float().cpu()[:, columns]
