"""Type m, a path beside the MLP, as r more hidden units of it: exact, and stock transformers loads it.

    mlp(x) + s·B Aᵀ x = down(silu(gate x) ∘ up x) + s·B Aᵀ x

A new unit has a gate of rows 0 and bias c, so silu(c) whatever x; up rows s·Aᵀ / silu(c); down columns B. That needs
biases, which the config's `mlp_bias` switches on: for all projections of all layers, zero but for the new gates. Every
layer grows alike; in layers without a delta the new rows and columns are zero.

c = 1.2784645427610738 makes silu(c) = 1. bf16 rounds it to 1.28125, whose silu is 1.003; there c = 64, whose silu is
64 to the last bit of every dtype, and dividing by it only moves exponents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from regraft.core.architectures import Architecture, Slot, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.host import host
from regraft.core.operations import Value
from regraft.core.patch import Edit
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.core.tensors import LazyTensor, RowReader
from regraft.plugins.vlora.settings import TYPES

if TYPE_CHECKING:
    import torch

PARALLEL = "m"
"""The type that is a path beside the MLP."""

SILU_ONE = 1.2784645427610738
"""silu(SILU_ONE) = 1."""

_WIDE_GATE = 64.0
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SWITCH, _WIDTH = "mlp_bias", "intermediate_size"


def gate_of(dtype: str) -> tuple[float, float]:
    """The bias c of new gates, and silu(c), for a stored dtype.

    silu(64) is 64 to the last bit in every dtype, and stays it in whatever dtype the model is written or loaded. Only
    where up rows are fp16, and the 64th part of small ones could fall below its range, is c the number whose silu is 1.
    """
    return (SILU_ONE, 1.0) if dtype == "F16" else (_WIDE_GATE, _WIDE_GATE)


class Filled(LazyTensor):
    """A tensor of one number, made when it is read."""

    def __init__(self, name: str, shape: tuple[int, ...], value: float = 0.0) -> None:
        self.spec = TensorSpec(name, "F64", shape)
        self._value = value

    def open(self, device: str = "cpu") -> RowReader:
        """Rows of the number."""
        import torch

        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return lambda start, stop: torch.full((stop - start, *self.spec.shape[1:]), self._value, **options)


class Scaled(LazyTensor):
    """A tensor times a number, in float64, so that it is rounded once."""

    def __init__(self, tensor: LazyTensor, factor: float) -> None:
        self.spec = replace(tensor.spec, dtype="F64")
        self.tensor = tensor
        self._factor = factor

    def open(self, device: str = "cpu") -> RowReader:
        """Rows, multiplied."""
        read = self.tensor.open(device)
        return lambda start, stop: read(start, stop).double() * self._factor


class Joined(LazyTensor):
    """A tensor of the checkpoint with another below it, or beside it.

    Args:
        spec: of the result.
        tensor: of the checkpoint, or zeros where it has none.
        extra: what is added, any float dtype.
        axis: 0 puts it below, 1 beside.
    """

    def __init__(self, spec: TensorSpec, tensor: LazyTensor, extra: LazyTensor, axis: int) -> None:
        self.spec = spec
        self.tensor = tensor
        self.extra = extra
        self.sources = () if isinstance(tensor, Filled) else (tensor,)
        self._axis = axis

    @property
    def row_local(self) -> bool:
        """As the checkpoint's tensor."""
        return self.tensor.row_local

    @property
    def held_bytes(self) -> int:
        """What the reader of the tensor holds, and what is added."""
        return self.tensor.held_bytes + 2 * self.extra.spec.nbytes

    def open(self, device: str = "cpu") -> RowReader:
        """Reads from one, the other or both."""
        import torch

        from regraft.core.specs import torch_dtype

        read, more = self.tensor.open(device), self.extra.open(device)
        dtype, rows = torch_dtype(self.spec.dtype), self.tensor.spec.rows

        def below(start: int, stop: int) -> torch.Tensor:
            parts = []
            if start < rows:
                parts.append(read(start, min(stop, rows)).to(dtype))
            if stop > rows:
                parts.append(more(max(start, rows) - rows, stop - rows).to(dtype))
            return torch.cat(parts)

        def beside(start: int, stop: int) -> torch.Tensor:
            return torch.cat([read(start, stop), more(start, stop).to(dtype)], dim=1)

        return beside if self._axis else below


@dataclass(frozen=True)
class Widened:
    """What widening does: edits of every MLP, and the change of config.json."""

    edits: Mapping[str, Edit]
    config: Mapping[str, Any]


def check_widening(architecture: Architecture) -> None:
    """Refuse a model whose MLP cannot take type m.

    Raises:
        Unsupported: its class has no `mlp_bias`, another activation than silu, or experts.
    """
    switches = {role: architecture.bias_switch(role) for role in _PROJECTIONS}
    if set(switches.values()) != {_SWITCH}:
        raise _refusal(architecture, f"the {architecture.family} class has no key {_SWITCH} that gives the MLP biases")
    if architecture.settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _refusal(architecture, f"the MLP's activation is {architecture.settings['hidden_act']}, not silu")


def mergeable_types(architecture: Architecture) -> str:
    """All types that can be merged into the model."""
    try:
        check_widening(architecture)
    except Unsupported:
        return TYPES.replace(PARALLEL, "")
    return TYPES


def widened(
    checkpoint: Checkpoint,
    architecture: Architecture,
    pairs: Mapping[int, tuple[LazyTensor, LazyTensor]],
    *,
    rank: int,
    scale: float,
    multiple: int = 1,
) -> Widened:
    """The MLPs with `rank` more units, or with the next multiple of `multiple`; those beyond the rank are zero.

    Args:
        checkpoint: whose tensors are widened.
        architecture: its roles.
        pairs: by active layer Aᵀ [r, hidden] and B [hidden, r].
        rank: r.
        scale: s.
        multiple: of units.

    Raises:
        Unsupported: as `check_widening`; or a weight is in a dtype that cannot be computed with.
    """
    check_widening(architecture)
    units = -(-rank // multiple) * multiple
    config = {_WIDTH: architecture.intermediate_size + units, _SWITCH: True}
    names = [name for name in checkpoint.specs if not name.endswith(".bias")]
    after = architecture_of({**checkpoint.config, **config}, names, families=host().architectures())
    edits: dict[str, Edit] = {}
    for layer in range(architecture.num_layers):
        slots = {role: after.slot(role, layer) for role in _PROJECTIONS}
        stored = {role: _stored(checkpoint, slot) for role, slot in slots.items()}
        for role, extra in _extras(architecture, stored["gate_proj"].spec.dtype, pairs.get(layer), rank, scale).items():
            spec = TensorSpec(slots[role].tensor, stored[role].spec.dtype, slots[role].shape)
            axis = 1 if role == "down_proj" else 0
            edits[spec.name] = Edit(spec, Value(Joined(spec, stored[role], _padded(extra, units, axis), axis)))
        gate = gate_of(stored["gate_proj"].spec.dtype)[0] if layer in pairs else 0.0
        gates = {"gate_proj": Filled("gates", (rank,), gate), "up_proj": Filled("zeros", (rank,))}
        for role in _PROJECTIONS:
            more = _padded(gates[role], units, 0) if role in gates else None
            edits |= _bias(checkpoint, slots[role], stored[role].spec.dtype, more)
    return Widened(edits, config)


def _extras(
    architecture: Architecture, dtype: str, pair: tuple[LazyTensor, LazyTensor] | None, rank: int, scale: float
) -> dict[str, LazyTensor]:
    """Rows of gate and up projection, columns of the down projection; zero in a layer without a delta."""
    hidden = architecture.hidden_size
    rows, columns = Filled("zeros", (rank, hidden)), Filled("zeros", (hidden, rank))
    if pair is None:
        return {"gate_proj": rows, "up_proj": rows, "down_proj": columns}
    return {"gate_proj": rows, "up_proj": Scaled(pair[0], scale / gate_of(dtype)[1]), "down_proj": pair[1]}


def _padded(extra: LazyTensor, units: int, axis: int) -> LazyTensor:
    """With zeros along the axis, up to so many units."""
    shape = list(extra.spec.shape)
    missing, shape[axis] = units - shape[axis], units
    if not missing:
        return extra
    padding = [missing if place == axis else extent for place, extent in enumerate(shape)]
    return Joined(replace(extra.spec, shape=tuple(shape)), extra, Filled("zeros", tuple(padding)), axis)


def _bias(checkpoint: Checkpoint, slot: Slot, dtype: str, more: LazyTensor | None) -> dict[str, Edit]:
    """The bias of a projection: as it was or zero, then what comes behind it."""
    assert slot.bias is not None
    before = checkpoint.tensors.get(slot.bias)
    spec = TensorSpec(slot.bias, dtype if before is None else before.spec.dtype, (slot.num_rows,))
    if more is None:
        return {} if before is not None else {slot.bias: Edit(spec, Value(Filled("zeros", spec.shape)))}
    old = before or Filled("zeros", (slot.num_rows - more.spec.rows,))
    return {slot.bias: Edit(spec, Value(Joined(spec, old, more, 0)))}


def _stored(checkpoint: Checkpoint, slot: Slot) -> LazyTensor:
    tensor = checkpoint.tensor(slot.tensor)
    if tensor.spec.dtype not in FLOAT_CODES:
        raise Unsupported("a tensor that an image changes is in a dtype that cannot be computed with",
                          where=f"{checkpoint.label}: {slot.tensor}", expected=", ".join(sorted(FLOAT_CODES)),
                          found=tensor.spec.dtype, remedy="use an unquantised base")  # fmt: skip
    return tensor


def _refusal(architecture: Architecture, reason: str) -> Unsupported:
    return Unsupported(
        f"type m is a path beside the MLP, which this model cannot express: {reason}",
        where=f"config.json: model_type {architecture.model_type}",
        expected="a model such as llama, granite, smollm3",
        remedy='leave m out, with types = "qkvo" (the delta is then not all that the generator was trained for), or '
        'keep the generator in the checkpoint, with output = "attached"',
    )
