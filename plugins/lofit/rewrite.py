"""Plan and apply: where the offsets go, known before the run but for their values, and the patch with them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.offsets import HeadOffset
from regraft.core.operations import Value
from regraft.core.patch import Edit, Outline, Patch
from regraft.core.residual_bias import bake_residual_biases
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor, PromisedTensor
from regraft.core.training.footprint import model_bytes, state_bytes, training_bytes
from regraft.core.transformation import Run
from regraft.plugins.lofit.aim import Aim
from regraft.plugins.lofit.params import LofitParams

_SIDECAR = 'bake = "sidecar-patch", which leaves the weights alone and reports the offsets'
_TOKENS = 512
"""Of a sequence, for the memory that the plan names where `max_tokens` does not say."""


def lofit_outline(checkpoint: Checkpoint, params: LofitParams) -> Outline:
    """What the patch will change: a bias in every layer that may be chosen.

    Where the config switches biases on, or another class has them, all layers get one anyway. Where the model has
    them, the layers that are not chosen keep the bytes of theirs.

    Raises:
        UsageError, InputError, Unsupported: as `Aim.of`; or the model has no place for offsets.
    """
    aim = Aim.of(checkpoint, params)
    return replace(
        Outline.of(_promised(checkpoint, params, aim)),
        notes=_plan_notes(params, aim),
        workspace_bytes=_memory(checkpoint, params, aim),
        scratch_bytes=state_bytes(_learning(aim)),
    )


def lofit_patch(checkpoint: Checkpoint, params: LofitParams, run: Run) -> Patch:
    """Learn, and bake what was learnt.

    Raises:
        RegraftError: as `lofit_outline`, and as the training.
    """
    from regraft.plugins.lofit.fit import learn
    from regraft.plugins.lofit.report import metrics, reports, vector_name

    aim = Aim.of(checkpoint, params)
    promised = _promised(checkpoint, params, aim)
    learnt = learn(checkpoint, params, aim, run)
    offsets = [
        HeadOffset(layer, unit, MemoryTensor(vector_name(layer, unit, params), vector), params.site)
        for (layer, unit), vector in sorted(learnt.vectors.items())
    ]
    patch = Patch() if params.bake == "sidecar-patch" else _baked(checkpoint, params, aim, offsets)
    kept = {
        name: Edit(edit.spec, Value(checkpoint.tensor(name)))
        for name, edit in promised.edits.items()
        if name not in patch.edits
    }
    return replace(
        patch,
        edits={**patch.edits, **kept},
        notes=(*_notes(params, aim), *patch.notes, *_prefix_notes(learnt.prefix.get("reason"), params)),
        metrics=metrics(learnt, aim, params),
        reports=reports(learnt, aim, params),
    )


def _promised(checkpoint: Checkpoint, params: LofitParams, aim: Aim) -> Patch:
    """The patch as it would be with a head of every layer, without values."""
    if params.bake == "sidecar-patch":
        return Patch()
    spec = TensorSpec("offset", "F32", (aim.architecture.head_dim,))
    offsets = [HeadOffset(layer, 0, PromisedTensor(spec), params.site) for layer in aim.layers]
    try:
        return _baked(checkpoint, params, aim, offsets)
    except Unsupported as error:
        error.remedy = f"{error.remedy}; or use {_SIDECAR}" if error.remedy else f"use {_SIDECAR}"
        raise


def _baked(checkpoint: Checkpoint, params: LofitParams, aim: Aim, offsets: Iterable[HeadOffset]) -> Patch:
    assert params.bake != "sidecar-patch"
    return bake_residual_biases(checkpoint, aim.architecture, offsets, mode=params.bake)


def _plan_notes(params: LofitParams, aim: Aim) -> tuple[str, ...]:
    chosen = "" if params.scoring == "file" else "; which ones is known after the run"
    return (f"{_heads(params, aim)} learn an offset{chosen}", *_sidecar_notes(params))


def _notes(params: LofitParams, aim: Aim) -> tuple[str, ...]:
    return (f"{_heads(params, aim)} have learnt an offset ({params.task})", *_sidecar_notes(params))


def _heads(params: LofitParams, aim: Aim) -> str:
    kind = "heads" if params.site == "head" else "key-value heads"
    return f"{aim.count} of {aim.architecture.num_layers * aim.units} {kind}"


def _sidecar_notes(params: LofitParams) -> tuple[str, ...]:
    if params.bake != "sidecar-patch":
        return ()
    return ("the weights are those of the base: the offsets are in offsets.safetensors of the report, for `steer`",)


def _prefix_notes(reason: object, params: LofitParams) -> tuple[str, ...]:
    return (f"no prefix cache: {reason}",) if reason and params.prefix_cache != "off" else ()


def _memory(checkpoint: Checkpoint, params: LofitParams, aim: Aim) -> int:
    """Of the training, the model as it is held while it loads, and the prefix cache as far as the data bounds it."""
    rows = (params.micro_batch or params.batch_size) * (2 if params.task == "dpo" else 1)
    tokens = rows * (params.data.max_tokens or _TOKENS)
    cache = 0 if params.prefix_cache == "off" else min(params.prefix_bytes, _state_bytes(params, aim))
    halved = params.frozen == "bfloat16" or (params.frozen != "float32" and params.precision == "bfloat16")
    smaller = model_bytes(checkpoint) // 2 if halved else 0
    return training_bytes(checkpoint, _learning(aim), tokens=tokens) + cache - smaller


def _learning(aim: Aim) -> int:
    """Numbers that learn in the stage that has more of them."""
    return max(len(aim.layers) * aim.units, aim.count) * aim.architecture.head_dim


def _state_bytes(params: LofitParams, aim: Aim) -> int:
    """Of the states of all tokens in fp32: a token is hardly less than a byte of the data; a prompt has two answers."""
    from regraft.core.data.load import files_of

    files = [path for source in params.data.sources for path in files_of(source)]
    if not files:
        return params.prefix_bytes
    tokens = sum(path.stat().st_size for path in files) * (2 if params.task == "dpo" else 1)
    return tokens * aim.architecture.hidden_size * 4
