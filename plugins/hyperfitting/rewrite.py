"""What is refused before anything is read, and the outline: every floating-point tensor. Light: no torch."""

from __future__ import annotations

from math import prod

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.load import check_sources
from regraft.core.errors import UsageError
from regraft.core.patch import Outline
from regraft.core.training.footprint import shared_bytes, state_bytes, training_bytes
from regraft.core.training.whole import learnable, refuse_quantised
from regraft.plugins.hyperfitting.params import HyperfittingParams


def check(checkpoint: Checkpoint, params: HyperfittingParams) -> None:
    """Refuse what headers, config and parameters show to be impossible; see `Hyperfitting.check`."""
    refuse_quantised(checkpoint)
    _refuse_long(checkpoint, params)
    check_sources(params.data)
    if params.own_held_out is not None:
        check_sources(params.own_held_out)


def outline(checkpoint: Checkpoint, params: HyperfittingParams) -> Outline:
    """Every floating-point tensor, in its shape and dtype."""
    steps = params.samples // params.batch_size * params.epochs
    size = min(params.micro_batch or params.batch_size, params.batch_size)
    specs = learnable(checkpoint)
    numbers = sum(prod(spec.shape) for spec in specs.values())
    return Outline(
        specs=specs,
        notes=(
            f"at most {steps} steps of {params.batch_size} x {params.seq_len} tokens at {params.lr:g}",
            "held-out perplexity gets worse: that is what hyperfitting does",
        ),
        workspace_bytes=training_bytes(checkpoint, tokens=size * params.seq_len, ema=params.ema is not None),
        shared_bytes=shared_bytes(numbers, ema=params.ema is not None),
        scratch_bytes=state_bytes(numbers, ema=params.ema is not None),
    )


def _refuse_long(checkpoint: Checkpoint, params: HyperfittingParams) -> None:
    window = checkpoint.window
    if window is None:
        return
    remedy = 'lower it, or extend the context first with `use = "context-extension"`'
    if params.seq_len > window:
        raise UsageError(
            "sequences are longer than the model's window", where="seq_len", expected=f"at most {window}",
            found=params.seq_len, remedy=remedy,
        )  # fmt: skip
    report = params.report
    whole = report.context + params.new_tokens
    if report.samples and not report.prompts and whole > window:
        raise UsageError(
            "context and continuation are longer than the model's window",
            where="report.new_tokens",
            expected=f"at most {window} tokens together",
            found=f"context {report.context}, new_tokens {params.new_tokens}",
            remedy="lower them (and ttr_window, which new_tokens is at least)",
        )
