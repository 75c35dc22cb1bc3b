"""The fine-tune behind an extension, under the very scale that the exported checkpoint computes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.batches import Batches
from regraft.core.data.examples import Example, PreferenceExample
from regraft.core.data.load import Dataset, load_data
from regraft.core.errors import InputError, UsageError
from regraft.core.jsonio import dump
from regraft.core.patch import Patch
from regraft.core.training.head import Head
from regraft.core.training.loop import Records, Report, train
from regraft.core.training.modes import resolve_precision
from regraft.core.training.objectives import CrossEntropy
from regraft.core.training.progress import telling
from regraft.core.training.report import report_metrics, training_reports
from regraft.core.training.trained import stored_tensors, trained_patch
from regraft.core.training.weights import select
from regraft.core.training.whole import completed
from regraft.core.transformation import Run
from regraft.plugins.context_extension.model import model_of
from regraft.plugins.context_extension.settings import TuneSettings


@dataclass(frozen=True)
class Samples:
    """The data of a fine-tune.

    Args:
        data: sequences of at most the new length.
        longest: positions of the longest text in them.
        beyond: how many texts are longer than the window.
    """

    data: Dataset
    longest: int
    beyond: int


def read_samples(settings: TuneSettings, tokenizer: Any, *, window: int, target: int, seed: int) -> Samples:
    """Read the samples.

    Args:
        settings: of the fine-tune.
        tokenizer: of the checkpoint.
        window: the length the model was trained on.
        target: the length it is extended to.
        seed: of the draw that `max_rows` asks for.

    Raises:
        InputError: data cannot be read, or no text in it is longer than the window.
        UsageError: the data has preferences, or its keys are contradictory.
        Unsupported: the data has chats and the model no chat template.
    """
    data = load_data(settings.sequences(target), tokenizer, window=target, seed=seed)
    if any(isinstance(example, PreferenceExample) for example in data.examples):
        raise UsageError(
            "the data has preferences between answers, and the fine-tune learns answers", where="tune.data",
            expected="chats, prompts with completions, or texts", remedy="give other data, or name its columns",
        )  # fmt: skip
    lengths = [length for example in data.examples if isinstance(example, Example) for length in _texts(example)]
    longest = max(lengths)
    if longest <= window:
        raise InputError(
            "no sample is longer than the window that the model was trained on: they cannot teach a longer one",
            where="tune.data",
            expected=f"samples of more than {window} tokens",
            found=f"at most {longest}",
            remedy="give longer samples (2401.07004 takes those of ten thousand tokens and more), or leave tune out",
        )
    return Samples(data, longest, sum(length > window for length in lengths))


def tune(checkpoint: Checkpoint, patch: Patch, settings: TuneSettings, samples: Samples, run: Run) -> Patch:
    """Train all weights of an extended checkpoint.

    Args:
        checkpoint: as the extension makes it.
        patch: the extension, for its code.
        settings: of the fine-tune.
        samples: what is learnt.
        run: of the step.

    Returns:
        A patch to `checkpoint` with an edit for every floating-point tensor, figures and reports.

    Raises:
        RegraftError: see `ContextExtension.apply`.
    """
    resolve_precision(settings.precision, run.device)
    batches = Batches(samples.data.examples, settings.batching(), run.seed_for("tune order"), run.rank, run.world)
    run.tell(f"tune: {len(batches)} steps of {settings.batch_size} samples of at most {samples.longest} tokens")
    model = model_of(checkpoint, run, patch)
    names = list(select(model))
    for name in names:  # what cannot be stored is refused now, not after the training
        stored_tensors(checkpoint, model, name)
    report = _train(model, batches, settings, checkpoint, run)
    learnt = completed(checkpoint, trained_patch(checkpoint, model, names), model)
    figures = {
        "data": {**samples.data.summary(), "longest": samples.longest, "beyond_window": samples.beyond},
        **report_metrics(report),
        **learnt.metrics,
    }
    return Patch(
        edits=learnt.edits,
        metrics=figures,
        notes=(_note(report, samples),),
        reports=training_reports(report, "fine-tune of the extended model"),
    )


def _train(model: Any, batches: Batches, settings: TuneSettings, checkpoint: Checkpoint, run: Run) -> Report:
    records = Records(
        state=run.state / "tune" if run.state else None,
        identity={"config": hashlib.sha256(dump(dict(checkpoint.config))).hexdigest()},
        log=settings.log,
        tensorboard=settings.tensorboard,
        listen=telling(run.tell),
    )
    training = settings.training(run.seed_for("tune"))
    return train(model, batches, training, CrossEntropy(Head.of(model)), select(model), records=records)


def _texts(example: Example) -> Iterable[int]:
    """Lengths of the texts in a sequence: of itself, or of those packed in it with positions of their own."""
    if example.positions is None:
        return [len(example)]
    positions: Sequence[int] = example.positions
    ends = [index for index in range(1, len(positions)) if positions[index] == 0]
    return [stop - start for start, stop in zip([0, *ends], [*ends, len(positions)], strict=True)]


def _note(report: Report, samples: Samples) -> str:
    losses = f"loss {report.losses[0]:.3f} -> {report.losses[-1]:.3f}" if report.losses else "no step"
    return f"fine-tuned in {report.steps} steps on {len(samples.data.examples)} sequences: {losses}"
