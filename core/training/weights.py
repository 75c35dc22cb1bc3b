"""What learns: whole parameters or slices of them, in fp32, with their average."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.errors import Unsupported, UsageError


@dataclass(frozen=True)
class Trainable:
    """A parameter of which all, or the given rows or columns, learn.

    Args:
        parameter: of a model, or on its own.
        indices: along `axis`; None for all. Everything else keeps its bytes, and costs no optimiser state.
        axis: 0 for rows.
    """

    parameter: torch.nn.Parameter
    indices: tuple[int, ...] | None = None
    axis: int = 0

    def identity(self) -> list[Any]:
        """Shape, dtype and slice; JSON values."""
        chosen = None if self.indices is None else [self.axis, hashlib.sha256(repr(self.indices).encode()).hexdigest()]
        return [list(self.parameter.shape), str(self.parameter.dtype), chosen]


def select(model: Any, names: Iterable[str] | None = None) -> dict[str, Trainable]:
    """Whole parameters of `model` by name; all of them if None.

    Raises:
        UsageError: there is no such parameter.
    """
    parameters = dict(model.named_parameters())
    wanted = list(parameters) if names is None else list(names)
    if missing := [name for name in wanted if name not in parameters]:
        raise UsageError("the model has no such parameter", where=missing[0], expected=f"one of {len(parameters)}")
    return {name: Trainable(parameters[name]) for name in wanted}


class Weights:
    """The tensors that an optimiser sees, one for each trainable, in the order given.

    A whole fp32 parameter is its own. Anything else gets an fp32 copy, whose gradient is summed in fp32 over the pieces
    of a step and which is written back, rounded once, after it.

    Raises:
        Unsupported: a parameter that is not of floating point.
    """

    def __init__(self, trainable: Mapping[str, Trainable], *, masters: bool = True) -> None:
        self.trainable = dict(trainable)
        self.leaves: dict[str, torch.Tensor] = {}
        self.copied: list[str] = []
        for name, one in self.trainable.items():
            parameter = one.parameter
            if not parameter.is_floating_point():
                raise Unsupported(
                    "cannot learn", where=name, expected="floating point", found=parameter.dtype,
                    remedy="train weights that are not quantised",
                )  # fmt: skip
            parameter.requires_grad_(True)
            if one.indices is None and (parameter.dtype == torch.float32 or not masters):
                self.leaves[name] = parameter
            else:
                self.copied.append(name)
                self.leaves[name] = self._part(one, parameter.detach()).to(torch.float32, copy=True)

    def collect(self) -> None:
        """Add the gradients of the model's parameters to those of their copies; once for each piece of a step."""
        for name in self.copied:
            one, leaf = self.trainable[name], self.leaves[name]
            if one.parameter.grad is not None:
                part = self._part(one, one.parameter.grad).float()
                leaf.grad = part.clone() if leaf.grad is None else leaf.grad.add_(part)
                one.parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copies into the model's parameters."""
        for name in self.copied:
            one, leaf = self.trainable[name], self.leaves[name].to(self.trainable[name].parameter.dtype)
            if one.indices is None:
                one.parameter.copy_(leaf)
            else:
                one.parameter.index_copy_(one.axis, self._index(one), leaf)

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take other values, by name, and write them back."""
        for name, leaf in self.leaves.items():
            leaf.copy_(values[name])
        self.write_back()

    def clear(self) -> None:
        """No gradients, and nothing that asks for them."""
        for name, one in self.trainable.items():
            one.parameter.grad = None
            one.parameter.requires_grad_(False)
            self.leaves[name].grad = None

    def finite(self) -> bool:
        """Whether every value is."""
        return all(bool(torch.isfinite(leaf).all()) for leaf in self.leaves.values())

    def digest(self) -> str:
        """A hash over names and values."""
        import xxhash

        hasher = xxhash.xxh3_128()
        for name, leaf in self.leaves.items():
            hasher.update(name.encode())
            hasher.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hasher.hexdigest()

    @staticmethod
    def _index(one: Trainable) -> torch.Tensor:
        return torch.tensor(one.indices, device=one.parameter.device)

    def _part(self, one: Trainable, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if one.indices is None else tensor.index_select(one.axis, self._index(one))


class Average:
    """Exponential moving average ā ← α·ā + (1 - α)·w of the weights, begun at their first values."""

    def __init__(self, weights: Weights, decay: float) -> None:
        self.decay = decay
        self.values = {name: leaf.detach().clone() for name, leaf in weights.leaves.items()}

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """After a step."""
        for name, leaf in weights.leaves.items():
            self.values[name].lerp_(leaf.detach().to(self.values[name].dtype), 1 - self.decay)

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take saved values, by name."""
        for name, value in self.values.items():
            value.copy_(values[name])
