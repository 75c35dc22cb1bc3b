"""Low-rank factors that learn beside the new rows, and are merged into the weights that the step writes.

    y = W x + s · B (A x)        W: [outputs, inputs], A: [rank, inputs], B: [outputs, rank], s = alpha / rank

Hu et al., LoRA (arXiv 2106.09685). A begins as peft's does (Kaiming, uniform in ±1/√inputs), B as zeros, so the model
begins as it was. A fused projection, such as GPT-2's, learns as one, as with peft.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.architectures import Slot
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.low_rank import LowRankDelta, realised
from regraft.core.patch import Edit
from regraft.core.tensors import MemoryTensor
from regraft.core.training.weights import Trainable
from regraft.plugins.tokenizer_retrofit.body_places import body_slots
from regraft.plugins.tokenizer_retrofit.params import BodySettings


@dataclass(frozen=True, eq=False)
class _Pair:
    """Factors beside one module.

    Args:
        slot: where the weight is stored.
        module: of the model.
        A: [rank, inputs]; `B`: [outputs, rank].
        B: see `A`.
    """

    slot: Slot
    module: Any
    A: torch.nn.Parameter
    B: torch.nn.Parameter


class Body:
    """The factors beside a running model.

    Args:
        model: of transformers.
        checkpoint: whose weights it has.
        settings: of the factors.
        seed: of their first values.

    Raises:
        Unsupported: as `body_slots`; the model's class is not the stock one.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, settings: BodySettings, seed: int) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.scale = settings.alpha / settings.rank
        generator = torch.Generator().manual_seed(seed)
        self.pairs = {
            name: _pair(model, slot, settings.rank, generator)
            for name, slot in body_slots(checkpoint, settings).items()
        }

    def trainable(self) -> dict[str, Trainable]:
        """Both factors of every weight, by names that no parameter of the model has."""
        factors = {f"{name}: {letter}": getattr(pair, letter) for name, pair in self.pairs.items() for letter in "AB"}
        return {name: Trainable(factor) for name, factor in factors.items()}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While this lasts the model adds what the factors say."""
        with ExitStack() as stack:
            for pair in self.pairs.values():
                stack.callback(pair.module.register_forward_hook(self._hook(pair)).remove)
            yield

    def edits(self) -> dict[str, Edit]:
        """The deltas of the stored weights; those in which nothing was learnt keep every bit."""
        return {name: Edit(self.checkpoint.specs[name], self._delta(name, pair)) for name, pair in self.pairs.items()}

    def merge(self) -> float:
        """Put the weights into the model as the step will store them, rounded to the checkpoint's dtype.

        Returns:
            The largest share of a delta that rounding loses; see `core.low_rank.realised`.
        """
        lost = 0.0
        for name, pair in self.pairs.items():
            stored, delta = self.checkpoint.load(name), self._delta(name, pair)
            with torch.no_grad():
                pair.module.weight.copy_(delta.prepare("cpu")(0, stored.shape[0], stored))
            lost = max(lost, realised(stored, delta.left.load(), delta.right.load(), self.scale))
        return lost

    def figures(self) -> Mapping[str, Any]:
        """JSON values for the report."""
        return {**self.settings.model_dump(mode="json"), "weights": len(self.pairs)}

    def _delta(self, name: str, pair: _Pair) -> LowRankDelta:
        A, B = (factor.detach().float().cpu() for factor in (pair.A, pair.B))
        left, right = (A.T, B.T) if pair.slot.transposed else (B, A)
        first, second = (MemoryTensor(name, factor.contiguous().clone()) for factor in (left, right))
        return LowRankDelta(name, first, second, self.scale)

    def _hook(self, pair: _Pair) -> Callable[..., torch.Tensor]:
        def added(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            del module
            low = torch.nn.functional.linear(torch.nn.functional.linear(inputs[0], pair.A), pair.B)
            return output + (self.scale * low).to(output.dtype)

        return added


def _pair(model: Any, slot: Slot, rank: int, generator: torch.Generator) -> _Pair:
    try:
        module = model.get_submodule(slot.module or "")
        weight = module.weight
    except AttributeError:
        weight = None
    if weight is None or tuple(weight.shape) != slot.shape:
        raise Unsupported(
            "the model's class has no such module", where=slot.module, expected=f"a weight {list(slot.shape)}",
            found=type(model).__name__ if weight is None else list(weight.shape), remedy="leave adapt.body out",
        )  # fmt: skip
    outputs, inputs = reversed(slot.shape) if slot.transposed else slot.shape
    first = (torch.rand(rank, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
    factors = (torch.nn.Parameter(one.to(weight.device)) for one in (first, torch.zeros(outputs, rank)))
    return _Pair(slot, module, *factors)
