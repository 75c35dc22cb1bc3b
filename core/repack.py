"""`[output] quantize = "keep"`: an output whose weights are stored as those of its bitsandbytes base are.

Weights that no step changed keep the tensors of the base, which are copied byte for byte: codes, scales, tables, state.
Changed ones are quantised again in the form that the base's weight has. The config gets back its quantization_config,
and the tensors stand in the base's order, so that untouched files stay files.

A changed weight is computed in fp32 all the way from the base's codes, whatever dtype it is shown as: the only rounding
is that to the new codes, and a change too small for bfloat16 is still seen by what measures its loss.

Everything but the values is known at plan time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from regraft.core.checkpoint import CONFIG, Checkpoint, FileRef
from regraft.core.dequantised import EightBitTensor, FourBitTensor
from regraft.core.derived import TransposedTensor
from regraft.core.errors import Unsupported
from regraft.core.fourbit import STATE_MARK
from regraft.core.jsonio import dump, same
from regraft.core.operations import ComputedTensor, Convert
from regraft.core.patch import Renamed
from regraft.core.quantised import Stored, parts_like
from regraft.core.realised import Gauge, Realised
from regraft.core.specs import FLOAT_CODES, ITEM_BYTES, NAME_OF_CODE
from regraft.core.tensors import LazyTensor

_FOUR_BIT_SIDE = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    f"{STATE_MARK}nf4",
    f"{STATE_MARK}fp4",
)
_EIGHT_BIT_SIDE = ("SCB", "weight_format")
_REMEDY = 'set [output] quantize = "none", which writes dequantised weights'


@dataclass(frozen=True)
class Repacked:
    """An output in its base's quantised form.

    Args:
        checkpoint: the output.
        realised: tells, after the writing, how much of the changes the new codes keep.
        note: a sentence for the user.
    """

    checkpoint: Checkpoint
    realised: Realised
    note: str


def repack(base: Checkpoint, result: Checkpoint, uncast: Checkpoint | None = None) -> Repacked:
    """`result` with its weights stored as those of `base`.

    A weight of the result is quantised if the base's of that name is; or, where it has a new name, if the base's that
    differ only in the number of the layer are. A renamed one goes by its old name, quantised or not, and the config's
    list of modules that stay as they are follows it. A copy that a step makes under a new name goes by the new one:
    what it is a copy of is known in the run, but not to a plan.

    Args:
        base: opened from a checkpoint that bitsandbytes quantised: `base.packed` is set.
        result: what the steps made of it.
        uncast: the same before `[output] dtype`, if that changed any tensor.

    Raises:
        Unsupported: a weight to be quantised is no float matrix, or does not fill whole items of the base's storage.
    """
    packed = base.packed
    assert packed is not None
    weights = _Weights(base, packed)
    tensors: dict[str, LazyTensor] = {}
    origins: dict[str, str] = {}
    gauges: dict[str, Gauge] = {}
    made = (uncast or result).tensors
    untouched = again = 0
    for name, tensor in result.tensors.items():
        old = weights.origin(name, made[name])
        if old is None:
            tensors[name] = tensor
            origins[name] = name if name in packed.tensors else stripped(made[name]).spec.name
            continue
        for part in weights.parts(old):
            new = _module(name) + part[len(_module(old)) :]
            tensors[new] = _named(new, packed.tensors[part])
            if name in base.tensors or weights.is_stored(made[name]):
                origins[new] = part
        if weights.is_stored(made[name]):
            untouched += 1
            continue
        again += 1
        weight, stored = _checked(_oriented(base, old, tensor), weights.stored[old], result.label), weights.stored[old]
        if weight.spec.shape == stored.spec.shape:
            gauges[name] = Gauge(widened(stored))
        tensors |= {part.spec.name: part for part in parts_like(weight, stored, gauges.get(name))}
    place = {name: index for index, name in enumerate(packed.tensors)}
    order = sorted(tensors, key=lambda name: place.get(origins.get(name, ""), len(place)))
    shards = {name: packed.shards[origins[name]] for name in order if origins.get(name) in packed.shards}
    form = str(base.origin.get("quantization"))
    checkpoint = replace(
        result,
        tensors={name: tensors[name] for name in order},
        shards=shards,
        files={**result.files, CONFIG: _config(packed, result, _settings(weights, result, tensors))},
    )
    return Repacked(checkpoint, Realised(form, gauges), _note(form, untouched, again, base))


def gauges_of(base: Checkpoint, uncast: Checkpoint, method: str) -> Realised:
    """What measures an output that is asked for in the form which the base's weights happen to have: `nf4` or `int8`.

    A weight of another form, or of none, is quantised anew, and no change of it can be told from that.

    Args:
        base: of the run.
        uncast: what the steps made of it, before `[output] dtype`.
        method: the form that is asked for.
    """
    gauges = {}
    for name, tensor in uncast.tensors.items():
        before = base.tensors.get(name)
        stored = stored_weight(before) if before is not None else None
        if before is None or stored is None or stripped(tensor) is before or tensor.spec.shape != before.spec.shape:
            continue
        kind = stored.state.quant_type if isinstance(stored, FourBitTensor) else "int8"
        if kind == method:
            gauges[name] = Gauge(stored)
    return Realised(str(base.origin.get("quantization")), gauges)


def stripped(tensor: LazyTensor) -> LazyTensor:
    """The tensor without renaming."""
    while isinstance(tensor, Renamed):
        tensor = tensor.sources[0]
    return tensor


def widened(tensor: LazyTensor) -> LazyTensor:
    """The tensor in fp32, and with it everything that it is computed from, down to the base's codes."""
    spec = replace(tensor.spec, dtype="F32") if tensor.spec.dtype in ("F16", "BF16") else tensor.spec
    if isinstance(tensor, FourBitTensor):
        return FourBitTensor(
            spec, tensor.state, tensor.codes, tensor.scales, tensor.nested_scales, tensor.nested_map
        )  # fmt: skip
    if isinstance(tensor, EightBitTensor):
        return EightBitTensor(spec, *tensor.sources)
    if isinstance(tensor, TransposedTensor):
        return TransposedTensor(widened(tensor.sources[0]))
    if isinstance(tensor, Renamed):
        return Renamed(tensor.spec.name, widened(tensor.sources[0]))
    if not isinstance(tensor, ComputedTensor):
        return tensor
    if isinstance(tensor.operation, Convert):
        inner = widened(tensor.sources[0])
        return inner if inner.spec.name == spec.name else Renamed(spec.name, inner)
    return ComputedTensor(spec, tensor.operation, tuple(map(widened, tensor.sources)))


class _Weights:
    """The base's quantised weights, and which of them a weight of the result goes back to."""

    def __init__(self, base: Checkpoint, packed: Checkpoint) -> None:
        self.base, self.packed = base, packed
        self.stored = {name: found for name, tensor in base.tensors.items() if (found := stored_weight(tensor))}
        self._by_identity = {id(base.tensors[name]): name for name in self.stored}
        self._by_pattern = {_pattern(name): name for name in self.stored}
        self._of_base = {id(tensor) for tensor in base.tensors.values()}
        skipped = packed.config["quantization_config"].get("llm_int8_skip_modules")
        self._skipped = tuple(skipped) if isinstance(skipped, list) else ()

    def is_stored(self, tensor: LazyTensor) -> bool:
        """Whether it is a weight of the base, untouched."""
        return id(stripped(tensor)) in self._by_identity

    def origin(self, name: str, tensor: LazyTensor) -> str | None:
        """The weight of the base that `tensor` is, or is stored like; None if it is not to be quantised."""
        if (same := self._by_identity.get(id(stripped(tensor)))) is not None:
            return same
        if isinstance(tensor, Renamed) and id(stripped(tensor)) in self._of_base:
            return None
        if name in self.stored:
            return name
        if name in self.base.tensors or len(tensor.spec.shape) != 2 or _covered(_module(name), self._skipped):
            return None
        return self._by_pattern.get(_pattern(name))

    def parts(self, name: str) -> Iterator[str]:
        """The tensors that a weight is stored in, itself first."""
        four_bit = isinstance(self.stored[name], FourBitTensor)
        start, ends = (name, _FOUR_BIT_SIDE) if four_bit else (_module(name), _EIGHT_BIT_SIDE)
        yield name
        yield from (part for end in ends if (part := f"{start}{end}") in self.packed.tensors)


def stored_weight(tensor: LazyTensor) -> Stored | None:
    """The quantised weight that `tensor` shows as it is, perhaps turned; None for any other tensor."""
    inner = tensor.sources[0] if isinstance(tensor, TransposedTensor) else tensor
    return inner if isinstance(inner, FourBitTensor | EightBitTensor) else None


def _module(name: str) -> str:
    return name.removesuffix("weight")


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+\.", ".#.", name)


def _named(name: str, tensor: LazyTensor) -> LazyTensor:
    return tensor if tensor.spec.name == name else Renamed(name, tensor)


def _oriented(base: Checkpoint, old: str, tensor: LazyTensor) -> LazyTensor:
    """The values in fp32, as [out_features, in_features]."""
    wide = widened(tensor)
    if not isinstance(base.tensors[old], TransposedTensor) or len(wide.spec.shape) != 2:
        return wide
    return wide.sources[0] if isinstance(wide, TransposedTensor) else TransposedTensor(wide)


def _checked(weight: LazyTensor, stored: Stored, label: str) -> LazyTensor:
    spec, where = weight.spec, f"{label}: {weight.spec.name}"
    if spec.dtype not in FLOAT_CODES or len(spec.shape) != 2:
        raise Unsupported("cannot be stored quantised as in the base", where=where,
                          expected=f"{', '.join(sorted(FLOAT_CODES))}, two dimensions", found=spec,
                          remedy=_REMEDY)  # fmt: skip
    if isinstance(stored, FourBitTensor) and -(-spec.numel // 2) % (item := ITEM_BYTES[stored.codes.spec.dtype]):
        raise Unsupported("its codes do not fill whole items of the base's storage", where=where,
                          expected=f"a multiple of {item} bytes, stored as {stored.codes.spec.dtype}",
                          found=f"{-(-spec.numel // 2)} bytes", remedy=_REMEDY)  # fmt: skip
    return weight


def _config(packed: Checkpoint, result: Checkpoint, settings: Mapping[str, Any]) -> FileRef:
    """The result's config.json with the quantisation in it; the base's own file where they are the same."""
    config = {**result.config, "quantization_config": settings}
    return packed.files[CONFIG] if same(config, packed.config) else FileRef(data=dump(config))


def _settings(weights: _Weights, result: Checkpoint, tensors: Mapping[str, LazyTensor]) -> Mapping[str, Any]:
    """The base's quantization_config, with the modules that stay as they are in the result."""
    settings = dict(weights.packed.config["quantization_config"])
    listed = settings.get("llm_int8_skip_modules") or ["lm_head"]
    matrices = {name: tensor for name, tensor in result.tensors.items()
                if name.endswith(".weight") and len(tensor.spec.shape) == 2}  # fmt: skip
    plain = [name for name, tensor in matrices.items() if tensors[name] is tensor]
    quantised = [_module(name) for name in matrices.keys() - set(plain)]
    kept: list[str] = []
    for path in listed:
        one = (path,)
        stale = any(_covered(module, one) for module in quantised)
        kept += [_module(name)[:-1] for name in plain if _covered(_module(name), one)] if stale else [path]
    new = (name for name in plain if name not in weights.base.tensors or name in weights.stored)
    kept += [_module(name)[:-1] for name in new if not _covered(_module(name), kept)]
    if kept != listed:
        settings["llm_int8_skip_modules"] = list(dict.fromkeys(kept))
    return settings


def _covered(module: str, paths: Sequence[str]) -> bool:
    """Whether transformers leaves a module, named with a dot behind it, as it is where a config lists these."""
    return any(f".{module}".endswith(f".{path}.") or module.startswith(f"{path}.") for path in paths)


def _note(form: str, untouched: int, again: int, base: Checkpoint) -> str:
    shown = sorted({NAME_OF_CODE[t.spec.dtype] for t in base.tensors.values() if stored_weight(t) is not None})
    changed = (
        f", {again} changed ones are quantised again in the same form (refused if too little of the change arrives)"
        if again
        else ""
    )
    return (
        f"the base is quantised ({form}), and so is the output: {untouched} weights are copied as they are{changed}; "
        f'quantize = "none" writes {" and ".join(shown)} instead'
    )
