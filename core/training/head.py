"""Losses of labels straight from hidden states and head: the one place that calls the fused cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from regraft.core.data.batches import Batch
from regraft.core.data.examples import IGNORED
from regraft.core.errors import Unsupported
from regraft.kernels.linear_cross_entropy import linear_cross_entropy

_TOLERANCE, _LOW_TOLERANCE = 1e-3, 3e-2
"""Relative, for logits in fp32 and in less: what computes something else is off by far more."""


@dataclass(frozen=True)
class Head:
    """How a model's logits follow from the states that enter its output embeddings.

    Args:
        model: a causal language model of transformers.
        module: its output embeddings.
        softcap: c of c·tanh(z / c) on the logits, or None.
        fused: whether logits are known to be that function of the head, so that they need not be made at all.
    """

    model: Any
    module: Any
    softcap: float | None
    fused: bool

    @classmethod
    def of(cls, model: Any, *, fused: bool = True) -> Head:
        """The head of `model`; what it computes is tried on eight tokens, not assumed from the class.

        With `fused` False, or a head of another kind, losses come from the model's own logits: the same numbers, with
        memory for tokens × vocabulary.
        """
        module = model.get_output_embeddings()
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        plain = (
            fused and isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.is_floating_point()
        )
        head = cls(model, module, softcap, fused=plain)
        return head if not plain or head._agrees() else cls(model, module, softcap, fused=False)

    def label_losses(self, batch: Batch, *, reduction: str = "sum") -> torch.Tensor:
        """Cross-entropy of the labels, each from the token before it.

        Args:
            batch: B rows of T tokens.
            reduction: `sum`, a scalar; or `none`, [B, T]: 0 where nothing is learnt, and at the last token.

        Raises:
            Unsupported: texts are packed, and the model does not keep them apart.
        """
        if batch.position_ids is not None and not self.reads_apart:
            raise Unsupported(
                "this model reads packed texts as one, whatever their positions",
                where="restart_positions",
                found=self.model.config.model_type,
                remedy="leave restart_positions out, or do not pack",
            )
        labels = torch.cat([batch.labels[:, 1:], torch.full_like(batch.labels[:, :1], IGNORED)], dim=1)
        if not self.fused:
            logits = self._outputs(batch.input_ids, batch.position_ids).float()
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction)
        else:
            losses = linear_cross_entropy(
                self.hidden(batch.input_ids, batch.position_ids).flatten(0, 1),
                self.module.weight,
                labels.flatten(),
                bias=getattr(self.module, "bias", None),
                ignore_index=IGNORED,
                reduction="sum" if reduction == "sum" else "none",
                softcap=self.softcap,
            )
        return losses if reduction == "sum" else losses.view_as(labels)

    @cached_property
    def reads_apart(self) -> bool:
        """Whether attention ends where position ids begin anew; tried on two texts of four tokens."""
        device = self.module.weight.device
        ids = torch.arange(8, device=device).remainder(self.module.weight.shape[0]).view(2, 4)
        positions = torch.arange(8, device=device).remainder(4)[None]
        with _evaluating(self.model):
            packed, apart = self._outputs(ids.view(1, 8), positions), self._outputs(ids, None)
        return _close(packed.reshape_as(apart), apart)

    def hidden(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The states [B, T, hidden_size] that enter the head, times the factor that the class puts on its logits.

        The whole model runs, hooks on it included, with a head that hands its input on.
        """
        with _handing_on(self.module, self.model.config.get_text_config()):
            return self._outputs(input_ids, position_ids)

    def _outputs(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        positions = {} if position_ids is None else {"position_ids": position_ids}
        outputs: torch.Tensor = self.model(input_ids=input_ids, use_cache=False, **positions).logits
        return outputs

    def _agrees(self) -> bool:
        weight, bias = self.module.weight, getattr(self.module, "bias", None)
        ids = torch.arange(8, device=weight.device).remainder(weight.shape[0])[None]
        try:
            with _evaluating(self.model):
                logits = self._outputs(ids, None)
                ours = F.linear(self.hidden(ids).float(), weight.float(), None if bias is None else bias.float())
        except (RuntimeError, TypeError):
            return False
        if self.softcap is not None:
            ours = self.softcap * torch.tanh(ours / self.softcap)
        return ours.shape == logits.shape and _close(ours, logits)


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two logits are the same but for rounding."""
    tolerance = _TOLERANCE if other.dtype == torch.float32 else _LOW_TOLERANCE
    return bool((one.float() - other.float()).norm() <= tolerance * other.float().norm())


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _handing_on(module: Any, config: Any) -> Iterator[None]:
    """For the time of a forward pass, a head that is the identity, and no softcap behind it."""
    softcap = getattr(config, "final_logit_softcapping", None)
    module.forward = lambda states: states
    if softcap is not None:
        config.final_logit_softcapping = None
    try:
        yield
    finally:
        del module.forward
        if softcap is not None:
            config.final_logit_softcapping = softcap
