"""Bakes constant offsets and head scales into a checkpoint that stock classes load.

An offset goes into a bias, by the first way that there is:

1. a bias that the model has;
2. one that a switch of its config adds (`attention_bias`, `mlp_bias`, ...), beside zeros for the switch's other biases;
3. one of another stock class that computes the same: Qwen2, Mistral and Phi-3 as Llama or SmolLM3 (`reexpress`);
4. refusal.

Offsets of heads become `b_o' = b_o + Σ_h W_o[:, h] v_h`, with W_o as it is below the step. Offsets of key-value groups
go into the biases of v_proj, which every query head of the group passes on unchanged because its attention weights sum
to one; no other class is taken for them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from regraft.core.architectures import Architecture
from regraft.core.bias_routes import OUTPUTS, Mode, Route, find_route
from regraft.core.checkpoint import Checkpoint
from regraft.core.derived import ConstantTensor
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.offsets import HeadOffset, HeadScale, Offset, ResidualBias
from regraft.core.operations import Value
from regraft.core.patch import Edit, Patch
from regraft.core.residual_operations import BiasUpdate, Projection, ScaleColumns, Term
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.core.value_bias import check_value_bias

__all__ = ["HeadOffset", "HeadScale", "Mode", "Offset", "ResidualBias", "bake_head_scales", "bake_residual_biases"]


def bake_residual_biases(
    checkpoint: Checkpoint,
    architecture: Architecture,
    biases: Iterable[Offset],
    *,
    scales: Iterable[HeadScale] = (),
    mode: Mode = "auto",
) -> Patch:
    """The patch that adds `biases`, made from headers and config alone. Without `scales`, no stored weight changes.

    Args:
        checkpoint: what to add them to.
        architecture: its roles.
        biases: several of one place add up.
        scales: scales of heads for the same patch; offsets of heads use W_o as it is before them.
        mode: `keep-class` never writes the model as another class.

    Raises:
        UsageError: there is no such layer or head, or a head is scaled twice.
        InputError: a vector has another shape, or no float dtype; a tensor is missing.
        Unsupported: the model has no place for an offset.
    """
    biases = list(biases)
    layers: defaultdict[str, set[int]] = defaultdict(set)
    for bias in biases:
        bias.check(architecture)
        layers[bias.role].add(bias.layer)
    if "v_proj" in layers:
        check_value_bias(checkpoint, architecture)
    route = find_route(checkpoint, architecture, {role: sorted(layers[role]) for role in sorted(layers)}, mode)
    _check_stray(checkpoint, architecture, route.architecture)
    scaled = bake_head_scales(checkpoint, architecture, scales)
    updates = _updates(checkpoint, architecture, route.architecture, biases)
    zeros = _zeros(checkpoint, architecture, route.architecture, updates) if route.patch.json else {}
    return replace(
        route.patch,
        edits={**route.patch.edits, **zeros, **updates, **scaled.edits},
        notes=(*_route_notes(route, layers, len(zeros)), *route.patch.notes, *scaled.notes),
    )


def bake_head_scales(checkpoint: Checkpoint, architecture: Architecture, scales: Iterable[HeadScale]) -> Patch:
    """The patch that multiplies columns of o_proj (rows, where it is stored transposed) by `1 + scale · vector`.

    Raises:
        UsageError: there is no such layer or head, or a head is scaled twice.
        InputError: a vector has another shape, or no float dtype.
        Unsupported: it is not known where the model keeps o_proj, or it is quantised.
    """
    terms: defaultdict[int, dict[int, Term]] = defaultdict(dict)
    for scale in scales:
        scale.check(architecture)
        if scale.head in terms[scale.layer]:
            raise UsageError("a head is scaled twice", where=scale.vector.spec.name,
                             found=f"layer {scale.layer}, head {scale.head}", remedy="give one scale")  # fmt: skip
        start = architecture.head_columns(scale.head).start
        terms[scale.layer][scale.head] = Term(scale.vector, start, scale.scale)
    edits = {}
    for layer, by_head in sorted(terms.items()):
        spec, slot = _output_projection(checkpoint, architecture, layer), architecture.slot("o_proj", layer)
        columns = architecture.num_heads * architecture.head_dim
        ordered = tuple(by_head[head] for head in sorted(by_head))
        edits[spec.name] = Edit(spec, ScaleColumns(spec.name, ordered, columns, slot.transposed))
    count = sum(map(len, terms.values()))
    notes = (f"o_proj: {_counted(count, 'head')} scaled in {_layers(terms)}",) if count else ()
    return Patch(edits=edits, notes=notes)


def _updates(
    checkpoint: Checkpoint, before: Architecture, after: Architecture, biases: Sequence[Offset]
) -> dict[str, Edit]:
    """The biases that take up the offsets, in the dtype they have, or in that of o_proj."""
    terms: defaultdict[tuple[str, int], list[Term]] = defaultdict(list)
    heads: defaultdict[int, list[Term]] = defaultdict(list)
    for bias in biases:
        if isinstance(bias, ResidualBias):
            (run,) = after.slot(bias.role, bias.layer).rows
            terms[bias.role, bias.layer].append(Term(bias.vector, run.start, bias.scale))
        elif bias.site == "kv-group":
            start = after.head_rows("v_proj", bias.layer, bias.head).start
            terms["v_proj", bias.layer].append(Term(bias.vector, start, bias.scale))
        else:
            heads[bias.layer].append(Term(bias.vector, before.head_columns(bias.head).start, bias.scale))
    for layer, offsets in heads.items():
        slot = before.slot("o_proj", layer)
        weight = checkpoint.tensor(_output_projection(checkpoint, before, layer).name)
        terms["o_proj", layer].append(Term(Projection(weight, tuple(offsets), transposed=slot.transposed)))
    edits = {}
    for (role, layer), added in sorted(terms.items()):
        slot = after.slot(role, layer)
        assert slot.bias is not None
        size = slot.shape[slot.row_axis]
        spec = _bias_spec(checkpoint, before, slot.bias, size, layer)
        edits[slot.bias] = Edit(spec, BiasUpdate(tuple(added), slot.bias if slot.bias in checkpoint.specs else None))
    return edits


def _bias_spec(checkpoint: Checkpoint, before: Architecture, name: str, size: int, layer: int) -> TensorSpec:
    if name not in before.expected_specs():
        return TensorSpec(name, _output_projection(checkpoint, before, layer).dtype, (size,))
    spec = checkpoint.tensor(name).spec
    if spec.shape != (size,) or spec.dtype not in FLOAT_CODES:
        raise InputError(
            "the bias is not what the config says",
            where=f"{checkpoint.label}: {name}",
            expected=f"[{size}] in one of {', '.join(sorted(FLOAT_CODES))}",
            found=spec,
            remedy="correct config.json, or fetch the checkpoint again",
        )
    return spec


def _output_projection(checkpoint: Checkpoint, architecture: Architecture, layer: int) -> TensorSpec:
    slot = architecture.slot("o_proj", layer)
    spec = checkpoint.tensor(slot.tensor).spec
    if spec.dtype not in FLOAT_CODES:
        raise Unsupported(
            "the output projection is in a dtype that cannot be computed with",
            where=f"{checkpoint.label}: {spec.name}",
            expected=", ".join(sorted(FLOAT_CODES)),
            found=spec.dtype,
            remedy="use the unquantised model",
        )
    if spec.shape != slot.shape:
        raise InputError(
            "the output projection is not what the config says",
            where=f"{checkpoint.label}: {spec.name}",
            expected=list(slot.shape),
            found=list(spec.shape),
            remedy="correct config.json, or fetch the checkpoint again",
        )
    return spec


def _check_stray(checkpoint: Checkpoint, before: Architecture, after: Architecture) -> None:
    """Refuse tensors that the config as it is ignores, and that the result's would take for its own."""
    for name in after.expected_specs().keys() - before.expected_specs().keys():
        if name in checkpoint.specs:
            raise InputError(
                "the checkpoint has a tensor that its config switches off, and that the biases would switch on",
                where=f"{checkpoint.label}: {name}",
                remedy="remove the tensor, or correct config.json",
            )


def _zeros(
    checkpoint: Checkpoint, before: Architecture, after: Architecture, updates: Mapping[str, Edit]
) -> dict[str, Edit]:
    """Zeros for the biases that the result has beside those that take something up."""
    edits: dict[str, Edit] = {}
    dtype = _output_projection(checkpoint, before, 0).dtype
    for name, shape in after.expected_specs().items():
        if name.endswith(".bias") and name not in checkpoint.specs and name not in updates:
            spec = TensorSpec(name, dtype, shape)
            edits[name] = Edit(spec, Value(ConstantTensor(spec, bytes(spec.nbytes))))
    return edits


def _route_notes(route: Route, layers: Mapping[str, set[int]], zeros: int) -> list[str]:
    notes = [f"{_layers(layers[role])}, {OUTPUTS[role]}: {kind}" for role, kind in route.kinds.items()]
    if zeros:
        notes.append(f"besides: {_counted(zeros, 'bias', 'biases')} of zeros, because the config adds them")
    if set(route.kinds.values()) != {"in place"} and route.kinds:
        notes.append("other programs than transformers may ignore these biases: compare their logits before serving")
    return notes


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _layers(numbers: Iterable[int]) -> str:
    """`layer 3`, or `layers 0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"layer{'s' if sum(map(len, runs)) > 1 else ''} {text}"
