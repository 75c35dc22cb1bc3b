"""Check, plan and apply of `mode = "segments"`: the two maps, their settings, and the code that runs them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.data.load import check_sources
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.operations import Value
from regraft.core.patch import Edit, Outline, Patch, overlay
from regraft.core.portable_code import code_patch, portable_code, read_template, refuse_other_code
from regraft.core.specs import FLOAT_CODES, TensorSpec, torch_dtype
from regraft.core.tensors import MemoryTensor
from regraft.core.training.footprint import state_bytes, training_bytes
from regraft.core.training.whole import refuse_quantised
from regraft.core.transformation import Run
from regraft.core.verify.structure import TOKENIZER
from regraft.plugins.fourier_head.families import SEGMENTS_PREFIX, StockFamily, family_of
from regraft.plugins.fourier_head.params import FourierHeadParams
from regraft.plugins.fourier_head.segments.params import SegmentSettings

MODULE = "modeling_segments"
CLASS = "SegmentsForCausalLM"
CONFIG_CLASS = "SegmentsConfig"
_OLD_HEAD = "embed_out.weight"
ENCODER, DECODER, MIX = "ts.encoder", "ts.decoder", "ts.mix_scale"


def check(checkpoint: Checkpoint, params: FourierHeadParams) -> None:
    """Refuse models that are none of ours, contexts that do not fit, and data that is not there.

    Raises:
        Unsupported: the family, code of its own, or quantised weights.
        UsageError: more segments than the model has positions; there is no such data.
        InputError: stamps, and no tokenizer.
    """
    settings = settings_of(params)
    _stock(checkpoint)
    refuse_quantised(checkpoint)
    positions = checkpoint.window
    if positions is not None and settings.count > positions:
        raise UsageError(
            "the context has more segments than the model has positions", where="segments.context",
            expected=f"at most {positions} x {settings.length}", found=settings.context,
            remedy="lower context, or make segments longer",
        )  # fmt: skip
    if settings.stamps and TOKENIZER not in checkpoint.files:
        raise InputError(
            "stamps are texts, and the checkpoint has no tokenizer.json", where=checkpoint.label,
            remedy="save the tokenizer in the fast format, or set stamps = false",
        )  # fmt: skip
    for source in settings.sources:
        check_sources(DataSettings(source=source))


def outline(checkpoint: Checkpoint, params: FourierHeadParams) -> Outline:
    """The maps, and what their training takes."""
    settings = settings_of(params)
    _, architecture = _stock(checkpoint)
    specs = new_specs(checkpoint, architecture, settings)
    trained = sum(math.prod(spec.shape) for spec in specs.values())
    tokens = (settings.micro_batch or settings.batch_size) * settings.count
    patch = without_tensors(checkpoint, settings)
    notes = (*_notes(settings), f"the maps learn, at most {settings.epochs} epochs, lr {settings.lr:g}")
    return replace(
        Outline.of(patch), specs=specs, notes=notes, scratch_bytes=state_bytes(trained),
        workspace_bytes=training_bytes(checkpoint, trained, tokens=tokens),
    )  # fmt: skip


def make_patch(checkpoint: Checkpoint, params: FourierHeadParams, run: Run) -> Patch:
    """The patch before any training: maps as linear layers begin, and a mix of one to one."""
    settings = settings_of(params)
    _, architecture = _stock(checkpoint)
    specs = new_specs(checkpoint, architecture, settings)
    edits = {name: Edit(spec, Value(MemoryTensor(name, _start(spec, specs, run)))) for name, spec in specs.items()}
    numbers = sum(math.prod(spec.shape) for spec in specs.values())
    metrics = {"segment": settings.length, "context": settings.context, "new_parameters": numbers}
    return replace(without_tensors(checkpoint, settings), edits=edits, metrics=metrics, notes=_notes(settings))


def apply(checkpoint: Checkpoint, params: FourierHeadParams, run: Run) -> Patch:
    """The patch, with the maps trained.

    Raises:
        RegraftError: as the data is read, and as the training.
    """
    from regraft.plugins.fourier_head.segments.fit import fit

    patch = make_patch(checkpoint, params, run)
    return fit(overlay(checkpoint, patch, by=run.step), patch, settings_of(params), run)


def settings_of(params: FourierHeadParams) -> SegmentSettings:
    """The table, which the mode requires."""
    assert params.segments is not None
    return params.segments


def new_specs(checkpoint: Checkpoint, architecture: Architecture, settings: SegmentSettings) -> dict[str, TensorSpec]:
    """The tensors that the step adds, in the dtype of the embeddings."""
    hidden, length, width = architecture.hidden_size, settings.length, settings.width
    shapes: dict[str, tuple[int, ...]] = {}
    for name, inputs, outputs in ((ENCODER, length, hidden), (DECODER, hidden, length)):
        if width is not None:
            shapes |= {f"{name}.hidden.weight": (width, inputs), f"{name}.hidden.bias": (width,)}
        shapes |= {f"{name}.weight": (outputs, width or inputs), f"{name}.bias": (outputs,)}
    if settings.stamps:
        shapes[MIX] = (1,)
    stored = checkpoint.specs[architecture.slot("embed_tokens").tensor].dtype
    dtype = stored if stored in FLOAT_CODES else "F32"
    return {name: TensorSpec(name, dtype, shape) for name, shape in shapes.items()}


def without_tensors(checkpoint: Checkpoint, settings: SegmentSettings) -> Patch:
    """The patch without its edits: config and code."""
    family, _ = _stock(checkpoint)
    model_type = f"{SEGMENTS_PREFIX}{checkpoint.config['model_type']}"
    literals = {
        "length": settings.length,
        "stock_class": family.stock_class,
        "config_class": family.config_class,
        "model_type": model_type,
    }
    rendered = portable_code(read_template(__package__, f"{MODULE}.py.template"), literals)
    made = code_patch(MODULE, CLASS, rendered)
    block: dict[str, Any] = {"length": settings.length, "context": settings.context, "stamps": settings.stamps}
    if settings.width is not None:
        block["width"] = settings.width
    auto_map = {**(checkpoint.config.get("auto_map") or {}), **made.config["auto_map"]}
    auto_map["AutoConfig"] = f"{MODULE}.{CONFIG_CLASS}"
    config = {**made.config, "auto_map": auto_map, "model_type": model_type, "segments": block}
    # transformers renames it by the model type, which is a new one
    renames = {"lm_head.weight": _OLD_HEAD} if _OLD_HEAD in checkpoint.specs else {}
    return Patch(json={CONFIG: config}, files=dict(made.files), renames=renames)


def _stock(checkpoint: Checkpoint) -> tuple[StockFamily, Architecture]:
    family = family_of(checkpoint.config)
    refuse_other_code(checkpoint)
    stock = checkpoint.config.get("architectures") or [family.stock_class]
    if stock != [family.stock_class]:
        raise Unsupported(
            "the model is no causal language model", where="config.json: architectures", expected=family.stock_class,
            found=", ".join(map(str, stock)), remedy="use a checkpoint of the causal language model",
        )  # fmt: skip
    return family, architecture_of(checkpoint.config, checkpoint.specs)


def _start(spec: TensorSpec, specs: dict[str, TensorSpec], run: Run) -> Any:
    import torch

    if spec.name == MIX:
        return torch.ones(1, dtype=torch_dtype(spec.dtype))
    inputs = specs[f"{spec.name.rpartition('.')[0]}.weight"].shape[1]
    generator = torch.Generator().manual_seed(run.seed_for(spec.name))
    drawn = (2 * torch.rand(spec.shape, generator=generator) - 1) * inputs**-0.5
    return drawn.to(torch_dtype(spec.dtype))


def _notes(settings: SegmentSettings) -> tuple[str, ...]:
    return (
        f"forecasts series from {settings.count} segments of {settings.length} numbers; the model itself stays",
        "load with trust_remote_code=True; without it transformers refuses, since it does not know the model type",
    )
