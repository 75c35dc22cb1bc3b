"""What the step changes and costs: from headers, config and parameters. Light: no torch."""

from __future__ import annotations

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.load import check_sources
from regraft.core.errors import UsageError
from regraft.core.patch import Outline
from regraft.core.training.footprint import shared_bytes, state_bytes, training_bytes
from regraft.core.training.whole import learnable, refuse_quantised
from regraft.plugins.fine_tune.params import FineTuneParams
from regraft.plugins.fine_tune.target import Target, target_of

_USUAL_TOKENS = 2048
"""Of a sequence, for the estimate of memory, where the recipe gives no limit and the window is longer."""


def check(checkpoint: Checkpoint, params: FineTuneParams) -> None:
    """Refuse what headers and parameters show to be impossible; see `FineTune.check`."""
    refuse_quantised(checkpoint)
    for settings in (params.data, params.held_out):
        if settings is not None:
            check_sources(settings)
            _check_window(checkpoint, settings.max_tokens)


def outline(checkpoint: Checkpoint, params: FineTuneParams) -> Outline:
    """The tensors that learn, whole or in part, in their shapes and dtypes."""
    target = target_of(checkpoint, params)
    tokens = (params.micro_batch or params.batch_size) * (params.data.max_tokens or _length(checkpoint))
    if params.task == "dpo":
        tokens *= 2
    return Outline(
        specs=target.specs,
        notes=(selected(checkpoint, target),),
        workspace_bytes=training_bytes(checkpoint, target.numbers, tokens=tokens, ema=params.ema is not None),
        shared_bytes=0 if target.slices else shared_bytes(target.numbers, ema=params.ema is not None),
        scratch_bytes=state_bytes(target.numbers, ema=params.ema is not None),
    )


def selected(checkpoint: Checkpoint, target: Target) -> str:
    """What learns, in words."""
    total = sum(spec.numel for spec in learnable(checkpoint).values())
    share = f"{target.numbers} of {total} numbers learn"
    if target.heads:
        layers = {layer for layer, _ in target.heads}
        return f"{_counted(len(target.heads), 'head')} in {_counted(len(layers), 'layer')}: {share}"
    return f"{_counted(len(target.specs), 'tensor')}: {share}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _check_window(checkpoint: Checkpoint, max_tokens: int | None) -> None:
    window = checkpoint.window
    if window is not None and max_tokens is not None and max_tokens > window:
        raise UsageError(
            "sequences may not be longer than the model's window",
            where="max_tokens",
            expected=f"at most {window}",
            found=max_tokens,
            remedy='lower it, or extend the context first with `use = "context-extension"`',
        )


def _length(checkpoint: Checkpoint) -> int:
    return min(checkpoint.window or _USUAL_TOKENS, _USUAL_TOKENS)
