"""What learns, and how it acts on a model. Legend: B, T, H heads, d_h head size, d hidden size, U units, n chosen ones.

A unit is a query head or, for the site `kv-group`, a key-value head: its numbers then hold for every query head that
shares it. Both kinds act on whole layers, without a loop over heads, and in fp32 however the model computes:

    stage 1   o = W (z + A ⊙ z)       A [U, d_h], all units of a layer
    stage 2   o = W z + C v           v [n, d_h], C = W[:, chosen] [d, n · d_h], made once: W is frozen
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from regraft.core.architectures import Architecture
from regraft.core.offsets import HeadSite
from regraft.core.training.modules import role_module
from regraft.core.training.weights import Trainable

INIT_STD = 1e-3
"""Of A: so that the absolute value of the penalty has a slope from the first step on."""


def units_of(architecture: Architecture, site: HeadSite) -> int:
    """Units of a layer."""
    return architecture.num_heads if site == "head" else architecture.num_kv_heads


class Adapters:
    """Parameters by layer, and the hooks by which they act while `attached`.

    Args:
        modules: o_proj of each layer.
        parameters: of each layer, fp32.
    """

    kind = ""

    def __init__(self, modules: Mapping[int, Any], parameters: Mapping[int, torch.nn.Parameter]) -> None:
        self.modules, self.parameters = modules, parameters

    @property
    def trainable(self) -> dict[str, Trainable]:
        """For the training loop."""
        return {f"layers.{layer}.{self.kind}": Trainable(one) for layer, one in self.parameters.items()}

    @property
    def count(self) -> int:
        """Numbers that learn."""
        return sum(one.numel() for one in self.parameters.values())

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While this lasts the model computes with them."""
        with ExitStack() as stack:
            for layer, module in self.modules.items():
                stack.callback(self._hook(layer, module))
            yield

    def _hook(self, layer: int, module: Any) -> Callable[[], None]:
        raise NotImplementedError


class HeadScales(Adapters):
    """A of stage 1, drawn from N(0, std²).

    Args:
        model: frozen.
        architecture: its roles.
        layers: that have scales.
        site: what a unit is.
        seed: of the draw; not read where `std` is 0.
        std: see above.
    """

    kind = "scales"

    def __init__(
        self,
        model: Any,
        architecture: Architecture,
        layers: Iterable[int],
        site: HeadSite,
        *,
        seed: int = 0,
        std: float = INIT_STD,
    ) -> None:
        units = units_of(architecture, site)
        self.repeats = architecture.num_heads // units
        generator = torch.Generator().manual_seed(seed)
        device = next(model.parameters()).device
        shape = (units, architecture.head_dim)
        parameters = {
            layer: torch.nn.Parameter((std * torch.randn(shape, generator=generator)).to(device)) for layer in layers
        }
        super().__init__({layer: role_module(model, architecture, "o_proj", layer) for layer in parameters}, parameters)

    def penalty(self, weight: float) -> Callable[[], torch.Tensor]:
        """`weight` times the sum of all absolute values."""
        return lambda: weight * torch.stack([one.abs().sum() for one in self.parameters.values()]).sum()

    def _hook(self, layer: int, module: Any) -> Callable[[], None]:
        """In fp32 the input is scaled. In less, 1 + A would round to 1 where |A| < 2^-9, so the difference goes
        through o_proj by itself: one product more.
        """
        parameter = self.parameters[layer]

        def scales() -> torch.Tensor:
            return parameter.repeat_interleave(self.repeats, 0).flatten()

        def before(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            return (torch.addcmul(args[0], args[0], scales()), *args[1:]) if _wide(args[0]) else None

        def after(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if _wide(args[0]):
                return None
            change = module.forward((args[0] * scales()).to(args[0].dtype)).float()
            bias = getattr(module, "bias", None)
            return _added(output, change if bias is None else change - bias.float())

        one, other = module.register_forward_pre_hook(before), module.register_forward_hook(after)
        return lambda: (one.remove(), other.remove(), None)[-1]


class HeadOffsets(Adapters):
    """v of stage 2, from 0.

    Args:
        model: frozen.
        architecture: its roles.
        chosen: units of each layer that has any.
        site: what a unit is.
    """

    kind = "offsets"

    def __init__(
        self, model: Any, architecture: Architecture, chosen: Mapping[int, Sequence[int]], site: HeadSite
    ) -> None:
        device, size = next(model.parameters()).device, architecture.head_dim
        modules = {layer: role_module(model, architecture, "o_proj", layer) for layer in chosen}
        super().__init__(
            modules,
            {
                layer: torch.nn.Parameter(torch.zeros(len(units), size, device=device))
                for layer, units in chosen.items()
            },
        )
        self.chosen, self.site = {layer: tuple(units) for layer, units in chosen.items()}, site
        self.columns = {
            layer: _columns(module, architecture, layer, self.chosen[layer], site) for layer, module in modules.items()
        }

    def bias(self, layer: int) -> torch.Tensor:
        """What the offsets of `layer` add to the output of o_proj, [d]."""
        return self.columns[layer] @ self.parameters[layer].flatten()

    def vectors(self) -> dict[tuple[int, int], torch.Tensor]:
        """The offset [d_h] of each unit, on the CPU."""
        return {
            (layer, unit): self.parameters[layer][number].detach().cpu().clone()
            for layer, units in self.chosen.items()
            for number, unit in enumerate(units)
        }

    def _hook(self, layer: int, module: Any) -> Callable[[], None]:
        remove: Callable[[], None] = module.register_forward_hook(
            lambda module, args, output: _added(output, self.bias(layer))
        ).remove
        return remove


def _wide(tensor: torch.Tensor) -> bool:
    """Whether o_proj computes in fp32."""
    return tensor.dtype == torch.float32 and not torch.is_autocast_enabled(tensor.device.type)


def _added(output: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The sum in fp32; it stays so under autocast, whose residual stream is fp32, and else is rounded once."""
    total = output.float() + change
    return total if torch.is_autocast_enabled(output.device.type) else total.to(output.dtype)


@torch.no_grad()
def _columns(module: Any, architecture: Architecture, layer: int, units: Sequence[int], site: HeadSite) -> torch.Tensor:
    """W's columns of the units, [d, n · d_h] in fp32; for key-value groups the sum over the group's heads."""
    group = architecture.num_heads // units_of(architecture, site)
    starts = [architecture.head_columns(unit * group + one).start for unit in units for one in range(group)]
    features = [start + offset for start in starts for offset in range(architecture.head_dim)]
    weight = module.weight
    if weight.is_floating_point():
        transposed = architecture.slot("o_proj", layer).transposed
        index = torch.tensor(features, device=weight.device)
        columns = weight.index_select(0, index).t() if transposed else weight.index_select(1, index)
    else:
        columns = _probed(module, features, architecture.num_heads * architecture.head_dim)
    by_head: torch.Tensor = columns.float().unflatten(1, (len(units), group, architecture.head_dim))
    return by_head.sum(2).flatten(1).contiguous()


def _probed(module: Any, features: Sequence[int], width: int) -> torch.Tensor:
    """The columns of a quantised weight, from what the module makes of unit vectors."""
    dtype = getattr(module, "compute_dtype", None) or torch.float32
    device = module.weight.device
    inputs = torch.zeros(len(features) + 1, width, dtype=dtype, device=device)
    inputs[torch.arange(len(features)), torch.tensor(features)] = 1.0
    outputs: torch.Tensor = module.forward(inputs).float()
    return (outputs[:-1] - outputs[-1]).t()
