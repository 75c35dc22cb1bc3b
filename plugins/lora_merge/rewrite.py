"""The patch of a merge: edits, and what tied embeddings and a grown vocabulary ask of config.json and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import CONFIG, Checkpoint, FileRef
from regraft.core.errors import InputError, Unsupported
from regraft.core.jsonio import merge
from regraft.core.low_rank import LowRankDelta
from regraft.core.operations import ComputedTensor, Convert, Operation, Value
from regraft.core.patch import Edit, Patch
from regraft.core.row_map import RowMap
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.core.tensors import LazyTensor
from regraft.plugins.lora_merge.adapter import Adapter, open_adapter
from regraft.plugins.lora_merge.base import BaseModel, Place
from regraft.plugins.lora_merge.operations import Rebased
from regraft.plugins.lora_merge.params import LoraMergeParams
from regraft.plugins.lora_merge.targets import Target, Targets

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
"""What an adapter folder brings of a tokenizer that was trained with it."""


def merge_patch(
    checkpoint: Checkpoint, params: LoraMergeParams, seed_for: Callable[[str], int] = lambda tensor: 0
) -> Patch:
    """The patch that merges an adapter, or takes it off; made from headers and configs alone.

    Args:
        checkpoint: the base.
        params: what to merge.
        seed_for: the seed of a tensor, for stochastic rounding.

    Raises:
        InputError: the adapter is not valid, or was made for another model.
        Unsupported: it cannot be merged into this base.
    """
    adapter = open_adapter(params.adapter)
    check_base(checkpoint, adapter, params)
    base = BaseModel(checkpoint, transposed=adapter.settings.fan_in_fan_out)
    sign = -1.0 if params.subtract else 1.0
    targets = Targets(adapter, base, sign * params.scale, seed_for if params.rounding == "stochastic" else None)
    targets.collect()
    if params.subtract:
        _check_subtracted(targets)
    config, notes = _settle_ties(targets)
    notes += _base_notes(targets) + _rounding_notes(targets, params)
    files: dict[str, FileRef] = {}
    if targets.vocabulary is not None:
        size, nested = {"vocab_size": targets.vocabulary}, base.nested()
        config = merge(config, {nested: size} if nested else size)
        files = _tokenizer(params.adapter)
        notes.append(_vocabulary_note(targets.vocabulary, files))
    return Patch(
        edits={name: _edit(base, target) for name, target in targets.by_tensor.items()},
        json={CONFIG: config} if config else {},
        files=files,
        metrics=_metrics(targets),
        notes=(_summary(targets, params), *notes),
    )


def check_base(checkpoint: Checkpoint, adapter: Adapter, params: LoraMergeParams) -> None:
    """Refuse a base whose weights are not those that the adapter's delta belongs to, and a part of a DoRA.

    Raises:
        Unsupported: an initialisation that changed the base, and no parameter that accepts it; a scale other than 1 for
            an adapter whose magnitudes were learnt with the whole delta, or that to be taken off.
    """
    if adapter.settings.dora and params.subtract:
        raise Unsupported("a DoRA adapter cannot be taken off: the lengths that its magnitudes replaced are gone",
                          where="subtract", remedy="go back to the base it was merged into")  # fmt: skip
    if adapter.settings.dora and params.scale != 1.0:
        raise Unsupported("a DoRA adapter has no half: its magnitudes belong to the whole delta", where="scale",
                          expected="1.0", found=params.scale, remedy="leave scale at 1")  # fmt: skip
    initialisation = adapter.settings.initialisation
    if initialisation and not params.residual_base:
        raise Unsupported(
            f"the adapter was initialised by {initialisation}, which changed the base weights it belongs to",
            where=f"{adapter.file.parent}: init_lora_weights", found=initialisation,
            remedy="convert it by save_pretrained with path_initial_model_for_weight_conversion, or name the residual "
            "model as the base and set residual_base = true",
        )  # fmt: skip


def _check_subtracted(targets: Targets) -> None:
    """Refuse to take off an adapter that brought tensors whole: what stood in their place is not known.

    Raises:
        Unsupported: naming the first.
    """
    whole = [target.place.tensor for target in targets.by_tensor.values() if target.start is not None]
    if whole:
        raise Unsupported(
            f"the adapter replaced {len(whole)} tensors whole, and what they were before is not in it",
            where=f"{targets.adapter.file}: {whole[0]}", found="a trained copy",
            remedy="go back to the base it was merged into",
        )  # fmt: skip


def _edit(base: BaseModel, target: Target) -> Edit:
    spec = base.spec(target.place)
    if spec.dtype not in FLOAT_CODES:
        where = f"{base.checkpoint.label}: {spec.name}"
        raise Unsupported("a tensor that the adapter changes is in a dtype that cannot be computed with", where=where,
                          expected=", ".join(sorted(FLOAT_CODES)), found=spec.dtype,
                          remedy="use an unquantised base")  # fmt: skip
    if target.start is None:
        return Edit(spec, target.delta or Convert(target.place.source))
    spec = replace(spec, shape=target.start.spec.shape)
    if target.delta is None:
        return Edit(spec, Value(target.start))
    return Edit(spec, Rebased(target.delta, _converted(target.start, spec)))


def _converted(tensor: LazyTensor, spec: TensorSpec) -> LazyTensor:
    return tensor if tensor.spec.dtype == spec.dtype else ComputedTensor(spec, Value(tensor), ())


def _settle_ties(targets: Targets) -> tuple[dict[str, Any], list[str]]:
    """Give a tied head a tensor of its own where embeddings and head part; returns changes of config.json and notes.

    An adapter of one side changes that side alone, as it does while it is not merged. peft's merge writes to the
    shared matrix and so changes both, unless the model was untied before.
    """
    base, changed = targets.base, targets.by_tensor
    if not base.tied or base.embeddings is None:
        return {}, []
    embeddings, head = changed.get(base.embeddings), changed.get(base.head)
    if embeddings is None and head is None:
        return {}, []
    apart = not targets.adapter.settings.keeps_ties and _trained_apart(targets, embeddings, head)
    if embeddings is not None and not apart:
        changed.pop(base.head, None)
        if base.head in base.specs:
            changed[base.head] = replace(embeddings, place=Place(base.head, embeddings.place.source))
        return {}, []
    for tensor, twin in ((base.embeddings, head), (base.head, embeddings)):
        if tensor not in changed and (targets.vocabulary is not None or tensor not in base.specs):
            changed[tensor] = _untouched(targets, tensor, twin)
    config: dict[str, Any] = {"tie_word_embeddings": False}
    nested = base.nested()
    if nested and "tie_word_embeddings" in base.checkpoint.config.get(nested, {}):
        config[nested] = {"tie_word_embeddings": False}
    return config, [f"embeddings and head part: {base.head} is stored, and tie_word_embeddings is false"]


def _untouched(targets: Targets, tensor: str, twin: Target | None) -> Target:
    """The side that the adapter does not change: as the base has it, or as resizing left both before the training."""
    place = Place(tensor, targets.base.embeddings or tensor)
    if targets.vocabulary is None:
        return Target(place)
    if twin is None or not twin.frozen:
        raise InputError("the adapter resizes embeddings and head but brings one of them", where=targets.adapter.file,
                         expected=tensor, remedy="save both with the adapter")  # fmt: skip
    return Target(place, start=twin.start)


def _trained_apart(targets: Targets, *ends: Target | None) -> bool:
    """Whether embeddings or head were trained: adapted, or saved whole on purpose and not because they were resized."""
    saved = {name.split(".")[-1] for name in targets.adapter.settings.modules_to_save}
    changed = [end for end in ends if end is not None]
    names = {end.place.tensor.removesuffix(".weight").split(".")[-1] for end in changed}
    return any(end.delta is not None for end in changed) or bool(names & saved)


def _tokenizer(folder: Path) -> dict[str, FileRef]:
    return {name: FileRef(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}


def _metrics(targets: Targets) -> dict[str, Any]:
    changes = targets.by_tensor.values()
    return {
        "adapted_tensors": sum(target.delta is not None for target in changes),
        "replaced_tensors": sum(target.delta is None and target.start is not None for target in changes),
        "ranks": sorted(targets.ranks),
    }


def _summary(targets: Targets, params: LoraMergeParams) -> str:
    counts = _metrics(targets)
    ranks = ", ".join(map(str, counts["ranks"])) or "none"
    kind = "DoRA" if targets.adapter.settings.dora else "LoRA"
    extra = f", times {params.scale:g}" if params.scale != 1.0 else ""
    whole = f"; {counts['replaced_tensors']} tensors replaced whole" if counts["replaced_tensors"] else ""
    which = f"{counts['adapted_tensors']} tensors (rank {ranks}{extra})"
    done = "taken off" if params.subtract else "merged into"
    return f"{kind} adapter {params.adapter.name} {done} {which}{whole}"


def _rounding_notes(targets: Targets, params: LoraMergeParams) -> list[str]:
    """What rounding does, and what earlier steps have done to the same tensors."""
    notes = []
    tensors = targets.base.checkpoint.tensors
    changes = targets.by_tensor.items()
    again = [name for name, target in changes if target.delta and _made_by(tensors.get(name), LowRankDelta)]
    if again and not params.subtract:
        notes.append(f"{len(again)} of these tensors hold the delta of an earlier step already; adapters that were "
                     "trained apart were not trained for their sum")  # fmt: skip
    if moved := [name for name, target in changes if _made_by(tensors.get(name), RowMap)]:
        notes.append(f"an earlier step gave {', '.join(moved)} other rows: right only if the adapter was trained "
                     "behind it, for the same tokens; an older one is to be merged before that step")  # fmt: skip
    if params.subtract:
        notes.append("each tensor is what it was before the merge, but for two roundings to its dtype")
    if params.rounding == "stochastic":
        notes.append("weights in bf16 and fp16 are rounded stochastically, by the recipe's seed")
    return notes


def _made_by(tensor: LazyTensor | None, kind: type[Operation]) -> bool:
    """Whether an operation of this kind stands somewhere below."""
    if isinstance(tensor, ComputedTensor) and isinstance(tensor.operation, kind):
        return True
    return tensor is not None and any(_made_by(source, kind) for source in tensor.sources)


def _vocabulary_note(rows: int, files: Mapping[str, FileRef]) -> str:
    own = "the base's tokenizer: the adapter brings none, so add its new tokens"
    tokenizer = f"the adapter's {', '.join(files)}" if files else own
    return f"the adapter changes the vocabulary to {rows} rows, with {tokenizer}"


def _base_notes(targets: Targets) -> list[str]:
    checkpoint, adapter, notes = targets.base.checkpoint, targets.adapter, []
    if targets.unused_copies:
        names = ", ".join(targets.unused_copies)
        notes.append(f"the adapter's copies of frozen weights are not used, the base's own are: {names}")
    if quantized := checkpoint.origin.get("quantization") or _packed(checkpoint):
        notes.append(f"merged into dequantised weights ({quantized})")
    if adapter.settings.initialisation:
        notes.append(f"the base was taken for the residual of a {adapter.settings.initialisation} initialisation")
    return notes


def _packed(checkpoint: Checkpoint) -> str:
    """The block-quantised encodings of a GGUF base."""
    encodings = checkpoint.origin.get("encodings", {})
    return ", ".join(name for name in encodings if name not in ("F64", "F32", "F16", "BF16"))
