"""What learns: whole parameters or slices of them, in fp32, with their average; of one process or of several."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.errors import Unsupported, UsageError
from regraft.core.training.distributed import Group


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

    @property
    def index(self) -> torch.Tensor:
        """`indices`, where the parameter is."""
        return torch.tensor(self.indices, device=self.parameter.device)

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """What learns of a tensor of the parameter's shape."""
        return tensor if self.indices is None else tensor.index_select(self.axis, self.index)

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
    of a step and which is written back, rounded once, after it. Of a parameter that is shared out among several
    processes this one's rows are the tensor: plain, so that every optimiser takes it.

    Args:
        trainable: what learns.
        masters: whether what is stored in less than fp32 gets a copy.
        shards: DTensors of those that are shared out, by name.

    Raises:
        Unsupported: a parameter that is not of floating point.
    """

    def __init__(
        self, trainable: Mapping[str, Trainable], *, masters: bool = True, shards: Mapping[str, Any] | None = None
    ) -> None:
        self.trainable = dict(trainable)
        self.shards = dict(shards or {})
        self.leaves: dict[str, torch.Tensor] = {}
        self.copied: list[str] = []
        for name, one in self.trainable.items():
            if name in self.shards:
                self.leaves[name] = self.shards[name].detach().to_local()
                continue
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
                self.leaves[name] = one.part(parameter.detach()).to(torch.float32, copy=True)

    def collect(self) -> None:
        """Add the gradients of the model's parameters to those of their copies; once for each piece of a step."""
        for name, shard in self.shards.items():
            self.leaves[name].grad = None if shard.grad is None else shard.grad.to_local()
        for name in self.copied:
            one, leaf = self.trainable[name], self.leaves[name]
            if one.parameter.grad is not None:
                part = one.part(one.parameter.grad).float()
                leaf.grad = part.clone() if leaf.grad is None else leaf.grad.add_(part)
                one.parameter.grad = None

    @property
    def copies(self) -> dict[str, torch.Tensor]:
        """Those that every process has whole."""
        return {name: leaf for name, leaf in self.leaves.items() if name not in self.shards}

    def add_up(self, group: Group, asked: Iterable[str]) -> None:
        """Sum the gradients of `asked`, what has any somewhere, over the processes; FSDP has summed those of shards."""
        wanted = set(asked)
        leaves = [leaf for name, leaf in self.copies.items() if name in wanted]
        for leaf in leaves:
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        group.add([leaf.grad for leaf in leaves if leaf.grad is not None])

    def clip(self, group: Group, longest: float) -> float:
        """Shorten the gradient, over all weights together, to `longest`; gives its length before."""
        leaves = [leaf for leaf in self.leaves.values() if leaf.grad is not None]
        if group.world == 1:
            return torch.nn.utils.clip_grad_norm_(leaves, longest).item()
        own = sum(group.gather(_square([self.leaves[name] for name in self.shards])))
        norm = (own + _square(list(self.copies.values()))) ** 0.5
        torch.nn.utils.clip_grads_with_norm_(leaves, longest, torch.tensor(norm))
        return float(norm)

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copies into the model's parameters."""
        for name in self.copied:
            one, leaf = self.trainable[name], self.leaves[name].to(self.trainable[name].parameter.dtype)
            if one.indices is None:
                one.parameter.copy_(leaf)
            else:
                one.parameter.index_copy_(one.axis, one.index, leaf)

    @torch.no_grad()
    def load(self, values: Mapping[str, torch.Tensor]) -> None:
        """Take other values, by name, and write them back."""
        for name, leaf in self.leaves.items():
            leaf.copy_(values[name])
        self.write_back()

    def forget_gradients(self) -> None:
        """No gradients."""
        for tensor in (*self.leaves.values(), *self.shards.values()):
            tensor.grad = None

    def clear(self) -> None:
        """No gradients, and nothing that asks for them."""
        self.forget_gradients()
        for one in self.trainable.values():
            one.parameter.grad = None
            one.parameter.requires_grad_(False)

    def finite(self, group: Group) -> bool:
        """Whether every value is, everywhere."""
        return all(group.gather(all(bool(torch.isfinite(leaf).all()) for leaf in self.leaves.values())))


def _square(leaves: Iterable[torch.Tensor]) -> float:
    """Of the length of their gradients together."""
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item() ** 2 if gradients else 0.0


def digest(trainable: Mapping[str, Trainable], *, masters: bool = True) -> str:
    """A hash over names and values, as `Weights` of them would begin."""
    import xxhash

    hasher = xxhash.xxh3_128()
    for name, one in trainable.items():
        whole = one.parameter.detach()
        value = one.part(whole).float() if masters or one.indices is not None else whole
        hasher.update(name.encode())
        hasher.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


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
