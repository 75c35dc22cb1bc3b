"""FSDP2 for the time of a training: whole parameters of the model are shared out among the processes.

Each decoder layer is a unit, gathered when it runs; what stands outside of layers (embeddings, head, last norm) is one
more. The objective runs inside that last unit, while its weights are gathered, because it may read them itself, as the
fused cross-entropy reads the head's. What is frozen, learns only in part or stands outside of the model is no part of
any unit: every process has a copy, and the gradients of copies are summed (`Weights.add_up`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from regraft.core.training.weights import Trainable

Compute = Callable[[Any], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]
Place = tuple[torch.nn.Module, str]


@dataclass(frozen=True)
class Shards:
    """What the processes share out among them.

    Args:
        parameters: this process's part of each trainable that is shared out, a DTensor in rows, by name.
        compute: the objective, with every weight that it reads gathered.
    """

    compute: Compute
    parameters: Mapping[str, Any] = field(default_factory=dict)


def sharable(model: Any, trainable: Mapping[str, Trainable], world: int) -> dict[str, Trainable]:
    """Those of `trainable` that are whole parameters of `model`, of one dtype, with rows for every process."""
    inside = {id(parameter) for parameter in model.parameters()}
    chosen = {
        name: one
        for name, one in trainable.items()
        if id(one.parameter) in inside and one.indices is None and _has_rows(one.parameter, world)
    }
    kinds = [one.parameter.dtype for one in chosen.values()]
    return {name: one for name, one in chosen.items() if one.parameter.dtype == kinds[0]}


def _has_rows(parameter: torch.Tensor, world: int) -> bool:
    """Whether no process goes empty when rows are dealt out in pieces of the same length, the last one shorter."""
    rows = parameter.shape[0] if parameter.dim() else 0
    return parameter.is_floating_point() and -(-rows // world) * (world - 1) < rows


@contextmanager
def shared_out(
    model: Any,
    compute: Compute,
    chosen: Mapping[str, Trainable],
    device: torch.device,
    *,
    precision: str,
    masters: bool,
) -> Iterator[Shards]:
    """While this lasts the `chosen` parameters are shared out; afterwards `model` is as it was, with what they learnt.

    The parameters themselves are empty meanwhile. After an error they stay so: the run is over.

    Args:
        model: a model whose parameters `chosen` are; the same everywhere.
        compute: the objective.
        chosen: from `sharable`.
        device: of the model.
        precision: weights are gathered in `bfloat16` where the training computes so.
        masters: weights that are stored in less than fp32 are kept in fp32.
    """
    if not chosen:
        yield Shards(compute)
        return
    unit = _Unit(model, compute)
    homes = {name: _homes(unit, one.parameter) for name, one in chosen.items()}
    before = [_Before(module) for module in unit.modules()]
    _share_out(unit, chosen, homes, device, precision=precision, masters=masters)
    for one in before:
        one.note_additions()
    for trainable in chosen.values():
        trainable.parameter.data = trainable.parameter.data.new_empty(0)
    yield Shards(unit.run, {name: homes[name][0].parameter for name in chosen})
    for name, trainable in chosen.items():
        whole = homes[name][0].parameter.full_tensor()
        trainable.parameter.data = whole.to(trainable.parameter.dtype)
    for one in before:
        one.bring_back()
    for name, trainable in chosen.items():
        for home in homes[name]:
            home.put(trainable.parameter)


class _Unit(torch.nn.Module):
    """The outermost unit: the model, and the objective as what it computes."""

    def __init__(self, model: torch.nn.Module, compute: Compute) -> None:
        super().__init__()
        self.model = model
        self._compute = [compute]  # in a list: an objective that is a module is no part of this one
        self._piece: Any = None

    def run(self, piece: Any) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The objective of `piece`, which is no argument of `forward`: FSDP would take it apart."""
        self._piece = piece
        losses: tuple[torch.Tensor, Mapping[str, torch.Tensor]] = self()
        return losses

    def forward(self) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """Between the gathering of the unit's weights and their release."""
        return self._compute[0](self._piece)


@dataclass(frozen=True)
class _Home:
    """A name under which a module holds a parameter; tied parameters have several homes."""

    module: torch.nn.Module
    name: str

    @property
    def parameter(self) -> Any:
        return self.module._parameters[self.name]

    def put(self, parameter: torch.nn.Parameter) -> None:
        self.module._parameters[self.name] = parameter


def _homes(unit: torch.nn.Module, parameter: torch.nn.Parameter) -> list[_Home]:
    return [
        _Home(module, name)
        for module in unit.modules()
        for name, held in module._parameters.items()
        if held is parameter
    ]


def _share_out(
    unit: _Unit,
    chosen: Mapping[str, Trainable],
    homes: Mapping[str, list[_Home]],
    device: torch.device,
    *,
    precision: str,
    masters: bool,
) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    learning = {id(one.parameter) for one in chosen.values()}
    copies = {parameter for parameter in unit.parameters() if id(parameter) not in learning}
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = _policy(next(iter(chosen.values())).parameter.dtype, precision)
    for part in [*_layers(unit.model), unit]:
        inside = {id(parameter) for parameter in part.parameters()}
        for name, one in chosen.items():
            if id(one.parameter) in inside:  # layer by layer, so that one layer at a time is there twice
                kept = one.parameter.detach().float() if masters else one.parameter.detach()
                whole = torch.nn.Parameter(kept)
                for home in homes[name]:
                    home.put(whole)
        if part is unit or inside & learning:
            fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=copies)
    for module in unit.modules():
        if isinstance(module, FSDPModule):  # a step's loss is a sum over all processes, not a mean
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.set_reduce_scatter_unused_params(True, recurse=False)


def _policy(stored: torch.dtype, precision: str) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    computed = torch.bfloat16 if stored == torch.float32 and precision == "bfloat16" else stored
    return MixedPrecisionPolicy(
        param_dtype=None if computed == torch.float32 else computed,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast casts what is to be cast, as it does in one process
    )


def _layers(model: Any) -> list[torch.nn.Module]:
    """The modules that transformers does not split between devices: decoder layers, and the like."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


class _Before:
    """What FSDP changes in a module: its class, attributes, hooks."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.names = set(vars(module))
        self.hooks = {name: set(value) for name, value in self._hooks()}
        self.added: set[str] = set()

    def note_additions(self) -> None:
        """Right after: what else comes to the module belongs to others."""
        self.added = set(vars(self.module)) - self.names

    def bring_back(self) -> None:
        """As it was, so that it can be shared out again; torch has no call that takes `fully_shard` back."""
        from torch.distributed._composable_state import _module_state_mapping

        _module_state_mapping.pop(self.module, None)
        self.module.__class__ = self.kind
        for name in self.added:
            delattr(self.module, name)
        for name, value in self._hooks():
            for key in set(value) - self.hooks.get(name, set()):
                del value[key]

    def _hooks(self) -> list[tuple[str, Any]]:
        return [
            (name, value) for name, value in vars(self.module).items() if "hooks" in name and isinstance(value, dict)
        ]
