"""What the head learns: tokens, or what the head before it predicted; never tokens x vocabulary, bins one at a time.

With g the gate's logit and Z the sum of exp(text logits), a token's loss is

    text       -log P_text(y) - log σ(log Z - g)        bin y      -log σ(g - log Z) - log P_y

which is the cross-entropy of the model's logits, since the masses of the bins sum to one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from regraft.core.data.batches import Batch
from regraft.core.data.examples import IGNORED
from regraft.core.training.head import Head
from regraft.kernels.linear_cross_entropy import linear_log_probs
from regraft.plugins.fourier_head.grid import Grid
from regraft.plugins.fourier_head.math import normalised_penalty, upstream_penalty

_PENALTIES = {"upstream": upstream_penalty, "normalized": normalised_penalty}


@dataclass(frozen=True)
class Rows:
    """A set of logits c·tanh(s·h·w / c): some rows of a matrix.

    Args:
        weight: [n, hidden].
        scale: s.
        softcap: c; None without.
        bias: [n], 0 or -inf, where rows are left out.
    """

    weight: torch.Tensor
    scale: float
    softcap: float | None
    bias: torch.Tensor | None = None

    def scores(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log P of the label among the rows, and the log of the sum of exp(logits), [T] each."""
        options: dict[str, Any] = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.scale}
        log_probs = linear_log_probs(states, self.weight, labels, **options)
        chosen = (states * self.weight[labels]).sum(1) * self.scale
        if self.softcap is not None:
            chosen = self.softcap * torch.tanh(chosen / self.softcap)
        return log_probs, chosen - log_probs

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """All of them, [T, n]."""
        found = F.linear(states, self.weight) * self.scale
        return found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)


@dataclass(frozen=True)
class Learner:
    """The losses of a model with the head, from its hidden states.

    Args:
        model: of the exported class.
        grid: where the bins lie.
    """

    model: Any
    grid: Grid

    @property
    def head(self) -> Any:
        """The head's module."""
        return self.model.lm_head

    def states(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [N, hidden] and next tokens [N] where there is something to learn; fp32."""
        hidden = Head(self.model, self.head, None, fused=False).hidden(batch.input_ids, batch.position_ids)
        labels = batch.labels[:, 1:].flatten()
        rows = (labels != IGNORED).nonzero().squeeze(1)
        return hidden[:, :-1].flatten(0, 1).index_select(0, rows).float(), labels.index_select(0, rows)

    def log_gate(self, states: torch.Tensor, text_sum: torch.Tensor) -> torch.Tensor:
        """g - log Z [N]."""
        if self.head.settings["gate"] == "linear":
            return F.linear(states, self.head.gate.weight.float(), self.head.gate.bias.float())[:, 0] - text_sum
        first = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        return self._rows(self.numeric_weight()).scores(states, first)[1] - text_sum

    def numeric_weight(self) -> torch.Tensor:
        """The rows that a gate with rows keeps."""
        start, stop = self.head.start, self.head.start + self.head.bins
        weight: torch.Tensor = self.head.embeddings[0].weight[start:stop] if self.head.tied else self.head.gate.weight
        return weight

    def text(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log P_text of a text label, and log Z, [N] each; of a bin's label the first means nothing."""
        start, bins = self.head.start, self.head.bins
        numeric = (labels >= start) & (labels < start + bins)
        weight = self.head.embeddings[0].weight if self.head.tied else self.head.weight
        if self.head.tied and self.head.softcap is not None:  # which would bring -inf back
            weight = torch.cat([weight[:start], weight[start + bins :]])
        if len(weight) < self.model.config.vocab_size:
            place = torch.where(labels >= start + bins, labels - bins, labels)
            return self._rows(weight).scores(states, torch.where(numeric, 0, place))
        left_out = torch.zeros(len(weight), device=weight.device)
        left_out[start : start + bins] = -torch.inf
        other = 0 if start else start + bins
        return self._rows(weight, left_out).scores(states, torch.where(numeric, other, labels))

    def _rows(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Rows:
        return Rows(weight.float(), self.head.scale, self.head.softcap, bias)


@dataclass(frozen=True)
class TokenLoss:
    """Cross-entropy of the tokens of a batch, in nats, and a penalty on every bin's density; the unit is a token."""

    learner: Learner
    regularizer: str = "none"
    weight: float = 0.0

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The sum over learnt tokens; `number_nll` and `text_nll` are its parts, `numbers` how many tokens are bins."""
        states, labels = self.learner.states(batch)
        with torch.autocast(states.device.type, enabled=False):
            return self._loss(states, labels)

    def _loss(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        head, grid = self.learner.head, self.learner.grid
        numeric = (labels >= head.start) & (labels < head.start + head.bins)
        coefficients = F.linear(states[numeric], head.fourier.weight.float(), head.fourier.bias.float())
        numbers = grid.nll(coefficients, labels[numeric] - head.start, floor=head.floor).sum()
        texts = numbers.new_zeros(())
        if head.mode == "hybrid":
            log_probs, text_sum = self.learner.text(states, labels)
            log_odds = self.learner.log_gate(states, text_sum)
            numbers = numbers - F.logsigmoid(log_odds[numeric]).sum()
            texts = -(log_probs[~numeric].sum() + F.logsigmoid(-log_odds[~numeric]).sum())
        figures = {"number_nll": numbers.detach(), "text_nll": texts.detach(), "numbers": numeric.sum()}
        loss = numbers + texts
        if self.regularizer != "none" and len(coefficients):
            loss = loss + self.weight * len(coefficients) * _PENALTIES[self.regularizer](coefficients)
        return loss, figures

    def identity(self) -> Mapping[str, Any]:
        """Its name and penalty."""
        return {"name": "fourier-head tokens", "regularizer": self.regularizer, "weight": self.weight}


@dataclass(frozen=True)
class FollowLoss:
    """How far the head is from the one before it, at every learnt position, whatever the token there; in nats.

    KL of the choice between text and number, plus KL of the bins given a number: the first as it is, the second whole
    even where numbers are unlikely, so that texts without numbers teach the density too.

    Args:
        learner: of the head.
        rows: [m, hidden] of the head before.
    """

    learner: Learner
    rows: torch.Tensor

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The sum over positions; `bins_kl` and `gate_kl` are its parts."""
        states, labels = self.learner.states(batch)
        with torch.autocast(states.device.type, enabled=False):
            return self._loss(states, labels)

    def _loss(self, states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        head, grid = self.learner.head, self.learner.grid
        teacher = Rows(self.rows.to(states), head.scale, head.softcap).logits(states).detach()
        wanted = teacher.log_softmax(1)
        coefficients = F.linear(states, head.fourier.weight.float(), head.fourier.bias.float())
        found = grid.log_masses(coefficients, floor=head.floor)
        bins = (wanted.exp() * (wanted - found)).sum()
        if head.mode == "replace":
            return bins, {"bins_kl": bins.detach()}
        _, text_sum = self.learner.text(states, labels)
        odds, ours = teacher.logsumexp(1) - text_sum, self.learner.log_gate(states, text_sum)
        share = odds.sigmoid()
        gate = share * (F.logsigmoid(odds) - F.logsigmoid(ours))
        gate = (gate + (1 - share) * (F.logsigmoid(-odds) - F.logsigmoid(-ours))).sum()
        return bins + gate, {"bins_kl": bins.detach(), "gate_kl": gate.detach()}

    def identity(self) -> Mapping[str, Any]:
        """Its name."""
        return {"name": "fourier-head follows the head before"}
