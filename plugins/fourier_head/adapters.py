"""Low-rank adapters of attention, while all else below the head is frozen: W + (α / r) B A, merged after the training.

Hu et al., LoRA (arXiv 2106.09685): queries and values, B begins at zero, A at random; here α = 2 r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.core.architectures import Architecture

if TYPE_CHECKING:
    import torch

    from regraft.core.training.weights import Trainable

SCALE = 2.0
ROLES = ("q_proj", "v_proj")


@dataclass(frozen=True)
class Place:
    """A projection that gets an adapter: its module in the stock class, and whether it is stored transposed."""

    module: str
    transposed: bool


def places(architecture: Architecture) -> dict[str, Place]:
    """The projections of queries and values, by the name of their tensor: one where they are fused."""
    slots = [architecture.slot(role, layer) for layer in range(architecture.num_layers) for role in ROLES]
    return {slot.tensor: Place(str(slot.module), slot.transposed) for slot in slots}


@dataclass
class Adapters:
    """The adapters of a model, fp32.

    Args:
        model: whose weights stay as they are until `merge`.
        where: projections, by the name of their tensor.
        rank: r.
        seed: of A.
    """

    model: Any
    where: Mapping[str, Place]
    rank: int
    seed: int
    pairs: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = field(init=False)

    def __post_init__(self) -> None:
        """A [r, in] uniform as in a linear layer, B [out, r] zero."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        self.pairs = {}
        for name, place in self.where.items():
            weight = self.model.get_submodule(place.module).weight
            rows, columns = reversed(weight.shape) if place.transposed else weight.shape
            down = (2 * torch.rand(self.rank, columns, generator=generator) - 1) * columns**-0.5
            up = torch.zeros(rows, self.rank)
            first, second = (torch.nn.Parameter(item.to(weight.device)) for item in (down, up))
            self.pairs[name] = first, second

    @property
    def trainable(self) -> dict[str, Trainable]:
        """What learns, by name."""
        from regraft.core.training.weights import Trainable

        return {f"{name}.{part}": Trainable(one) for name, pair in self.pairs.items()
                for part, one in zip(("down", "up"), pair, strict=True)}  # fmt: skip

    @property
    def parameters(self) -> list[str]:
        """The model's parameters that `merge` changes."""
        return [f"{place.module}.weight" for place in self.where.values()]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Added to what the projections put out."""
        from torch.nn import functional as F

        def adding(down: torch.Tensor, up: torch.Tensor) -> Any:
            return lambda module, inputs, output: output + SCALE * F.linear(F.linear(inputs[0], down), up)

        with ExitStack() as stack:
            for name, place in self.where.items():
                module = self.model.get_submodule(place.module)
                stack.callback(module.register_forward_hook(adding(*self.pairs[name])).remove)
            yield

    def merge(self) -> None:
        """Add B A to the model's weights."""
        import torch

        with torch.no_grad():
            for name, place in self.where.items():
                down, up = self.pairs[name]
                delta = SCALE * (up @ down)
                self.model.get_submodule(place.module).weight.add_(delta.T if place.transposed else delta)
