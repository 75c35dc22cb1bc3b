"""The judge's weights: logistic regression on hidden states, its scaler folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

C_GRID = (*(10 ** (-power / 2) for power in range(14, 0, -1)), 1.0, 3.0, 10.0, 50.0, 100.0)
"""AutoJudge's (arXiv 2504.20039): inverse strengths of the L2 penalty."""


@dataclass(frozen=True)
class Fitted:
    """weight [D] and bias for raw states; C that was chosen, and the area under the ROC curve on held-out rows."""

    weight: torch.Tensor
    bias: torch.Tensor
    c: float
    auc: float


def fit(states: torch.Tensor, matters: torch.Tensor, held_out: float, grid: Sequence[float], seed: int) -> Fitted:
    """Fit for every C, keep the one with the largest area on held-out rows (the smallest of equals).

    Args:
        states: [N, D].
        matters: [N] bool.
        held_out: share of the rows of each class, at least one.
        grid: values of C.
        seed: of the split.
    """
    generator = torch.Generator().manual_seed(seed)
    train = torch.ones(len(states), dtype=torch.bool)
    for label in (False, True):
        rows = (matters == label).nonzero()[:, 0]
        chosen = rows[torch.randperm(len(rows), generator=generator)]
        train[chosen[: max(1, int(held_out * len(rows)))]] = False
    x, y = states.double(), matters.double()
    mean, scale = x[train].mean(0), x[train].std(0, correction=0).clamp_min(1e-8)
    best: Fitted | None = None
    for c in sorted(grid):
        weight, bias = regress((x[train] - mean) / scale, y[train], c)
        raw, shift = fold(weight, bias, mean, scale)
        auc = area(x[~train] @ raw + shift, matters[~train])
        if best is None or auc > best.auc:
            best = Fitted(raw.float(), shift.float(), c, auc)
    assert best is not None
    return best


def regress(x: torch.Tensor, y: torch.Tensor, c: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [D] and bias that minimise ||w||² / 2 + C Σ v_i CE_i; v makes both classes weigh the same.

    Args:
        x: [N, D], float64.
        y: [N], 0 or 1.
        c: C.
    """
    share = y.mean()
    weights = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    parameters = torch.zeros(x.shape[1] + 1, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(
            x @ parameters[:-1] + parameters[-1], y, weight=weights, reduction="sum"
        )
        total = parameters[:-1].square().sum() / 2 + c * entropy
        total.backward()
        return total

    optimiser.step(loss)
    found = parameters.detach()
    return found[:-1], found[-1]


def fold(
    weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias for states that are not standardised: w / σ and b - Σ w μ / σ."""
    raw = weight / scale
    return raw, bias - raw @ mean


def area(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC curve: how often a positive row scores above a negative one; a draw counts half."""
    above = scores[positive][:, None] - scores[~positive][None]
    return float(((above > 0).double() + (above == 0).double() / 2).mean())
