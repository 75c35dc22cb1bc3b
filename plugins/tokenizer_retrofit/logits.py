"""The logits of kept tokens, before and after: equal wherever both vocabularies cut a text alike."""

from __future__ import annotations

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
    """

    probes: list[tuple[str, torch.Tensor, torch.Tensor]]
    kept: torch.Tensor

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
        return cls(probes, torch.tensor(list(moved.values())))

    def check(self, model: Any) -> None:
        """By the model after the step, as its rows were made.

        Raises:
            TransformationError: a kept token has other logits than before.
        """
        for text, ids, wanted in self.probes:
            found = _logits(model, ids, self.kept)
            gap, length = float((found - wanted).norm()), float(wanted.norm())
            if not gap <= _TOLERANCE * length:
                raise TransformationError("kept tokens have other logits than before", where=repr(text),
                                          expected=f"a difference below {_TOLERANCE} of their length",
                                          found=f"{gap / max(length, 1e-30):.3g}")  # fmt: skip


def _logits(model: Any, ids: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """[T, columns], fp32, on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad(), without_dropout(model):
        found: torch.Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return found[0].float().cpu()[:, columns]
