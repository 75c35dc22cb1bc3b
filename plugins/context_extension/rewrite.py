"""From a checkpoint and parameters to the patch: config, tokenizer length, code, folded weights, and the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from regraft.core.checkpoint import CONFIG, TOKENIZER_CONFIG, Checkpoint
from regraft.core.data.load import check_sources
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.jsonio import difference
from regraft.core.patch import Outline, Patch, overlay
from regraft.core.portable_code import CodePatch
from regraft.core.training.whole import learnable, refuse_quantised
from regraft.plugins.context_extension.cost import probe_bytes, tune_bytes, tune_shared_bytes, tune_state_bytes
from regraft.plugins.context_extension.exports import (
    check_native,
    check_remote_code,
    native_config,
    native_notes,
    remote_code,
)
from regraft.plugins.context_extension.families import RotaryFamily, family_of, windows_of
from regraft.plugins.context_extension.fold import fold_logit_scale
from regraft.plugins.context_extension.lm_infinite import branches, check_lm_infinite, lm_infinite_code
from regraft.plugins.context_extension.params import ContextExtensionParams
from regraft.plugins.context_extension.report import figure_notes, figures_of, native_slope
from regraft.plugins.context_extension.rope import Rope, extended, read_rope, text_config, written

_ROTARY_LEFTOVER = "rotary_emb.inv_freq"
_LOADS = "load with trust_remote_code=True; without it transformers refuses, rather than dropping the method"
_NEEDS_TUNING = {
    "entropy-abf": "the paper fine-tunes for 6 steps on 100 long samples after the change",
    "abf": "a larger base is meant to be followed by a short fine-tune",
    "linear": "position interpolation is meant to be followed by a short fine-tune",
}


@dataclass(frozen=True)
class Extension:
    """What is known before anything is written.

    Args:
        family: the model's row.
        text: the text model's config as it is.
        before, after: rotary parameters.
        original: c, the length the model was trained on.
        notes: what was composed or approximated.
    """

    family: RotaryFamily
    text: Mapping[str, Any]
    before: Rope
    after: Rope
    original: int
    notes: tuple[str, ...]


def extend(checkpoint: Checkpoint, params: ContextExtensionParams) -> Extension:
    """Work out the extension.

    Raises:
        Unsupported: it cannot be done for this model, or not with these parameters.
        InputError: the config is malformed.
    """
    family = family_of(checkpoint.config)
    text = text_config(checkpoint.config, family)
    before = read_rope(text, family)
    original = _original_length(text, before, params)
    _check_lengths(text, original, params.target_length)
    window_notes = _window_notes(family, text, params)
    if params.method == "lm-infinite":
        check_lm_infinite(checkpoint, family, text, before, params)
        branches(params, original)
        return Extension(family, text, before, before, original, ())
    after, notes = extended(before, family, params, original)
    if params.scales_logits and params.export == "native":
        check_native(checkpoint, family, before, original)
    elif params.scales_logits:
        check_remote_code(checkpoint, family)
        _check_skip(text, params.layers_skipped)
    return Extension(family, text, before, after, original, (*notes, *window_notes))


def check(checkpoint: Checkpoint, params: ContextExtensionParams) -> None:
    """Refuse what headers, config and parameters show to be impossible; see `ContextExtension.check`."""
    extend(checkpoint, params)
    if params.tune is not None:
        refuse_quantised(checkpoint)
        check_sources(params.tune.data)
    text = params.probing.text if params.probing else None
    if text is not None and not text.is_file():
        raise UsageError("there is no such file", where="probe.text", found=text, remedy="check the path")


def outline(checkpoint: Checkpoint, params: ContextExtensionParams) -> Outline:
    """What the step will do: the patch of the extension and, with a fine-tune, every floating-point tensor.

    Raises:
        Unsupported, InputError: as `make_patch`.
    """
    patch = make_patch(checkpoint, params)
    extension = Outline.of(patch)
    extended = overlay(checkpoint, patch, by="context-extension")
    specs, notes, memory, shared, state = dict(extension.specs), list(extension.notes), 0, 0, 0
    if params.tune is not None:
        specs |= learnable(extended)
        memory, state = tune_bytes(extended, params.tune, params.target_length), tune_state_bytes(extended, params.tune)
        shared = tune_shared_bytes(extended, params.tune)
        notes.append(
            f"fine-tunes all weights: {params.tune.epochs} epochs of batches of {params.tune.batch_size}, "
            f"lr {params.tune.lr:g}"
        )
    if params.probing is not None:
        probing = probe_bytes(extended, params.target_length)
        memory = max(memory, probing)
        shared = min(shared, memory - probing)  # every process probes by itself
        notes.append(f"probes the model before and after, in texts of up to {params.target_length} tokens")
    return replace(extension, specs=specs, notes=tuple(notes), workspace_bytes=memory, shared_bytes=shared,
                   scratch_bytes=state)  # fmt: skip


def make_patch(checkpoint: Checkpoint, params: ContextExtensionParams) -> Patch:
    """The patch of the extension itself, without what `tune` and `probe` add.

    Raises:
        Unsupported, InputError: as `extend`, and where a constant factor cannot be folded.
    """
    extension = extend(checkpoint, params)
    text = written(extension.text, extension.family, extension.after, params.target_length)
    notes, files, figures = (
        list(extension.notes),
        {},
        figures_of(extension.before, extension.after, extension.original, params),
    )
    if params.method == "lm-infinite":
        sizes = branches(params, extension.original)
        code = lm_infinite_code(str(checkpoint.config["model_type"]), extension.family, sizes)
        text, files = with_code(text, code), dict(code.files)
        figures |= dict(zip(("local_branch", "global_branch", "limit_distance"), sizes, strict=True))
        notes.append(_LOADS)
    elif params.scales_logits and params.export == "native":
        text = native_config(text, extension.original, native_slope(params, extension.original))
        notes += native_notes(checkpoint)
    elif params.scales_logits:
        code = remote_code(
            str(checkpoint.config["model_type"]), extension.family, extension.original, params.layers_skipped
        )
        text, files = with_code(text, code), dict(code.files)
        notes.append(_LOADS)
    config = {**checkpoint.config, extension.family.nested: text} if extension.family.nested else text
    edits = {} if params.logit_scale is None else fold_logit_scale(checkpoint, params.logit_scale)
    if params.method in _NEEDS_TUNING and params.tune is None:
        notes.append(_NEEDS_TUNING[params.method])
    if edits and not math.log2(params.logit_scale or 1).is_integer():
        notes.append(
            f"the factor {params.logit_scale:g} is folded with one rounding of each weight; powers of two need none"
        )
    return Patch(
        edits=edits,
        removals=frozenset(name for name in checkpoint.specs if name.endswith(_ROTARY_LEFTOVER)),
        json={CONFIG: difference(checkpoint.config, config), **_tokenizer_length(checkpoint, params.target_length)},
        files=files,
        metrics=figures,
        notes=(*figure_notes(figures), *notes),
    )


def with_code(text: Mapping[str, Any], code: CodePatch) -> dict[str, Any]:
    """The text model's config with the keys that name its code; other entries of `auto_map` stay."""
    auto_map = {**(text.get("auto_map") or {}), **code.config["auto_map"]}
    return {**text, **code.config, "auto_map": auto_map}


def _original_length(text: Mapping[str, Any], rope: Rope, params: ContextExtensionParams) -> int:
    if params.original_length is not None:
        return params.original_length
    key = "original_max_position_embeddings" if rope.kind == "yarn" else "max_position_embeddings"
    length = rope.parameters.get(key) if rope.kind == "yarn" else text.get(key)
    length = text.get("max_position_embeddings") if length is None else length
    if length is None:
        raise Unsupported(
            "it is not known what length the model was trained on",
            where=f"config.json: {key}",
            expected="a number of tokens",
            found="nothing",
            remedy="give original_length",
        )
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise InputError(
            "is no length",
            where=f"config.json: {key}",
            expected="a whole number above 1",
            found=repr(length),
            remedy="correct config.json, or give original_length",
        )
    return length


def _check_lengths(text: Mapping[str, Any], original: int, target: int) -> None:
    declared = text.get("max_position_embeddings")
    reach = max(original, declared if isinstance(declared, int) else 0)
    if target <= reach:
        raise Unsupported(
            "the model reaches that far already",
            where="target_length",
            expected=f"more than {reach}",
            found=target,
            remedy=f"give a target_length above {reach}",
        )


def _check_skip(text: Mapping[str, Any], skipped: int) -> None:
    layers = text.get("num_hidden_layers")
    if isinstance(layers, int) and skipped > layers:
        raise Unsupported(
            "more layers are exempt than there are",
            where="skip_layers",
            expected=f"at most {layers}",
            found=skipped,
            remedy="give fewer",
        )


def _window_notes(family: RotaryFamily, text: Mapping[str, Any], params: ContextExtensionParams) -> list[str]:
    windows = windows_of(family, text, params.target_length)
    if windows == "all":
        window = text.get("sliding_window", family.window)
        raise Unsupported(
            "no layer looks back further than its sliding window, so there is nothing to extend",
            where="config.json: sliding_window",
            expected="null",
            found=window,
            remedy="set sliding_window to null in config.json if the model may look back further",
        )
    if windows == "none":
        return []
    notes = []
    if family.local_key:
        notes.append("only the base of full-attention layers changes; sliding layers keep theirs")
    else:
        notes.append("sliding layers share the rotary parameters of the others, so theirs change as well")
    if params.scales_logits:
        notes.append(
            "a layer with a sliding window w takes min(p + 1, w) for p + 1 in the scale: it never sees more keys"
        )
    return notes


def _tokenizer_length(checkpoint: Checkpoint, length: int) -> dict[str, Mapping[str, Any]]:
    """The tokenizer's limit, if it has one below `length`; the huge numbers that mean "none" stay."""
    limit = checkpoint.json(TOKENIZER_CONFIG).get("model_max_length")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit >= length:
        return {}
    return {TOKENIZER_CONFIG: {"model_max_length": length}}
