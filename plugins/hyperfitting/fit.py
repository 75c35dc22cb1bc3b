"""The run: measure, train, store, measure what is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.errors import UsageError
from regraft.core.patch import Patch, overlay
from regraft.core.training.head import Head
from regraft.core.training.loop import Records, Report, train
from regraft.core.training.model import window_of
from regraft.core.training.modes import resolve_precision
from regraft.core.training.objectives import CrossEntropy
from regraft.core.training.progress import telling
from regraft.core.training.settings import TrainSettings
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.training.trained import stored_tensors, trained_patch
from regraft.core.training.weights import select
from regraft.core.training.whole import completed
from regraft.core.transformation import Run
from regraft.plugins.hyperfitting.data import Material, read_material
from regraft.plugins.hyperfitting.figures import measure
from regraft.plugins.hyperfitting.outcome import Outcome
from regraft.plugins.hyperfitting.params import HyperfittingParams


def fit(checkpoint: Checkpoint, params: HyperfittingParams, run: Run) -> Patch:
    """The patch with the trained weights; its figures are those of the weights as they are stored.

    Raises:
        RegraftError: see `Hyperfitting.apply`.
    """
    refuse_untrusted_code(checkpoint, trust=run.trust)
    precision = resolve_precision(params.precision, run.device)
    tokenizer = run.tokenizer(checkpoint)
    model = run.model(checkpoint)
    window = window_of(checkpoint, model)
    material = read_material(params, tokenizer, window, run)
    batches = Batches(
        material.training,
        BatchSettings(batch_size=params.batch_size, micro_batch=params.micro_batch, epochs=params.epochs),
        run.seed_for("order"),
        run.rank,
        run.world,
    )
    contexts = _contexts(params, material, tokenizer, window)
    names = list(select(model))
    for name in names:  # what cannot be stored is refused now, not after the training
        stored_tensors(checkpoint, model, name)
    run.tell(f"measuring the base on {len(material.held_out)} held-out sequences and {len(contexts)} continuations")
    before = measure(model, material, contexts, params, precision=precision, whose="the base")
    report = _train(model, batches, params, run)
    if report.resumed:
        run.tell(f"went on from step {report.resumed}")
    patch = completed(checkpoint, trained_patch(checkpoint, model, names, strength=params.strength), model)
    del model
    run.tell("measuring the result")
    stored = run.model(overlay(checkpoint, patch, by=run.step))
    after = measure(stored, material, contexts, params, precision=precision, whose="the trained model")
    outcome = Outcome(params, material, contexts, report, batches.per_epoch, before, after)
    return replace(
        patch,
        metrics={**outcome.metrics(), **patch.metrics},
        notes=(*material.notes, *outcome.notes()),
        reports=outcome.reports(tokenizer),
    )


def _train(model: Any, batches: Batches, params: HyperfittingParams, run: Run) -> Report:
    settings = TrainSettings(
        lr=params.lr,
        optimizer=params.optimizer,
        weight_decay=0.0,
        schedule="constant",
        clip_norm=params.clip_norm,
        precision=params.precision,
        ema=params.ema,
        stop_loss=params.stop_loss,
        dropout=False,
        gradient_checkpointing=params.gradient_checkpointing,
        seed=run.seed_for("training"),
        save_every=params.save_every,
    )
    records = Records(
        state=run.state / "tune" if run.state else None,
        log=params.log,
        tensorboard=params.tensorboard,
        listen=telling(run.tell),
    )
    return train(model, batches, settings, CrossEntropy(Head.of(model)), select(model), records=records)


def _contexts(params: HyperfittingParams, material: Material, tokenizer: Any, window: int) -> list[list[int]]:
    """The token ids to continue: of the prompts, or the beginnings of held-out sequences."""
    report = params.report
    if not report.prompts:
        return [list(one.ids[: report.context]) for one in material.held_out[: report.samples]]
    contexts = [list(tokenizer(prompt)["input_ids"]) for prompt in report.prompts]
    for number, ids in enumerate(contexts):
        if not 0 < len(ids) <= window - params.new_tokens:
            raise UsageError(
                "the prompt has no tokens" if not ids else "prompt and continuation exceed the model's window",
                where=f"report.prompts[{number}]",
                expected=f"1 to {window - params.new_tokens} tokens, and {params.new_tokens} that are generated",
                found=f"{len(ids)} tokens",
                remedy="change the prompt, or lower report.new_tokens",
            )
    return contexts
