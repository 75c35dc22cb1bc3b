"""SPAM: Adam that clips spikes of single gradients and resets its momentum (ICLR 2025, arXiv 2501.06842).

    g̃ = sign(g)·√(θ·v) where g² > θ·v, else g            element by element, v before the update
    m ← β₁m + (1 - β₁)g̃,  v ← β₂v + (1 - β₂)g̃²
    w ← w - lr·s·(m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + ε),  after w ← w·(1 - lr·s·decay)

Every ΔT steps m = v = 0, and the step size comes back over N steps: s_t = 1 - 0.99·½(1 + cos(πt / (N + 1))), t steps
after the reset. Written from the formulas. Our deviation from the authors' code: t of the bias correction restarts with
the moments; there it goes on, so that the first steps after a reset are up to three times too long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch


class Spam(torch.optim.Optimizer):
    """The optimiser.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: of Adam; the decay is decoupled.
        reset_every: ΔT; None never resets.
        warmup_steps: N.
        threshold: θ.
        grace_steps: steps after start and reset in which nothing is clipped, since v means nothing yet.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        reset_every: int | None = 500,
        warmup_steps: int = 150,
        threshold: float = 5000.0,
        grace_steps: int = 20,
    ) -> None:
        self.reset_every = reset_every
        self.warmup_steps = warmup_steps
        self.threshold = threshold
        self.grace_steps = grace_steps
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; gradients are not changed."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: torch.Tensor, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(total=0, since=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
        if self.reset_every and state["total"] and state["total"] % self.reset_every == 0:
            state["since"] = 0
            state["m"].zero_()
            state["v"].zero_()
        rate = group["lr"] * self._warmup(state["total"], state["since"])
        if state["since"] >= self.grace_steps:
            gradient = clip_spikes(gradient, state["v"], self.threshold)
        state["total"] += 1
        state["since"] += 1
        first, second = group["betas"]
        state["m"].lerp_(gradient, 1 - first)
        state["v"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = rate / (1 - first ** state["since"])
        root = (state["v"].sqrt() / math.sqrt(1 - second ** state["since"])).add_(group["eps"])
        parameter.mul_(1 - rate * group["weight_decay"])
        parameter.addcdiv_(state["m"], root, value=-size)

    def _warmup(self, total: int, since: int) -> float:
        """1 before the first reset."""
        return 1.0 if total == since else warmup_share(since, self.warmup_steps)


def clip_spikes(gradient: torch.Tensor, second_moment: torch.Tensor, threshold: float) -> torch.Tensor:
    """`gradient` where its square is at most θ times the second moment, elsewhere ±√(θ·v)."""
    bound = second_moment * threshold
    return torch.where(gradient.square() > bound, gradient.sign() * bound.sqrt(), gradient)


def warmup_share(step: int, warmup_steps: int) -> float:
    """Share of the step size in step `step` after a reset; 1 after `warmup_steps`."""
    if step >= warmup_steps:
        return 1.0
    return 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * step / (warmup_steps + 1)))
