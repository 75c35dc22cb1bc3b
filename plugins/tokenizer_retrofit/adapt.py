"""Training of the new rows alone: the body, the kept rows and everything else keep their bytes.

A polish, not a cure (about a sixth of what a replaced vocabulary loses, then a plateau), and a rate that is too high
does harm: so bits per byte of held-out text decide whether what was learnt is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.load import load_data
from regraft.core.errors import Unsupported
from regraft.core.training.head import Head
from regraft.core.training.loop import Records, train
from regraft.core.training.model import window_of
from regraft.core.training.objectives import CrossEntropy, Objective
from regraft.core.training.progress import telling
from regraft.core.training.report import report_metrics, training_reports
from regraft.core.training.settings import TrainSettings
from regraft.core.training.steps import Steps
from regraft.core.training.trained import stored_tensors
from regraft.core.training.weights import Trainable
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.alignment import Cutter
from regraft.plugins.tokenizer_retrofit.bits import bits_per_byte
from regraft.plugins.tokenizer_retrofit.likelihoods import LikelihoodMatching
from regraft.plugins.tokenizer_retrofit.params import AdaptSettings
from regraft.plugins.tokenizer_retrofit.teacher import batches_of, taught_steps
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    from regraft.core.checkpoint import FileRef


@dataclass(frozen=True, eq=False)
class Adapted:
    """What the training came to.

    Args:
        learnt: [rows, d] fp32 by table; empty where bits per byte did not fall, so that the rows stay as made.
        figures: JSON values.
        reports: curve and losses.
        notes: for the user.
    """

    learnt: dict[str, torch.Tensor]
    figures: dict[str, Any]
    reports: dict[str, FileRef]
    notes: tuple[str, ...]


def adapt(
    before: Checkpoint,
    after: Checkpoint,
    old: TokenizerFile,
    new: TokenizerFile,
    tables: Sequence[str],
    rows: Sequence[int],
    settings: AdaptSettings,
    held_out: Sequence[str],
    run: Run,
) -> Adapted:
    """Learn the new rows.

    Args:
        before, after: the checkpoint without and with the new vocabulary.
        old, new: the tokenizers.
        tables: names of the embeddings and the head.
        rows: that learn, those of new tokens.
        settings: of the training.
        held_out: passages whose bits per byte are measured before and after; none: what was learnt is kept unseen.
        run: the run.

    Raises:
        RegraftError: as the training.
        Unsupported: the model's class holds a table otherwise than the checkpoint.
        InputError: for `alm`, no passage is spelt alike by both vocabularies.
    """
    tokenizer = run.tokenizer(after)
    taught = taught_steps(before, Cutter(tokenizer, new), old, settings, run) if settings.loss == "alm" else None
    model = run.model(after)
    head = Head.of(model)
    learns = _tables(after, model, tables, rows)
    initial = bits_per_byte(head, tokenizer, held_out, run.device) if held_out else None
    batches, summary = taught if taught is not None else _text_steps(after, model, tokenizer, settings, run)
    objective: Objective = CrossEntropy(head) if taught is None else LikelihoodMatching(head)
    options = TrainSettings(
        lr=settings.lr, warmup_steps=min(settings.warmup_steps, len(batches)), schedule=settings.schedule,
        betas=(0.9, 0.95), precision=settings.precision, seed=run.seed_for("training"),
    )  # fmt: skip
    records = Records(
        state=run.state / "adapt" if run.state else None, listen=telling(run.tell),
        identity={"base": after.digest, "taught by": before.digest},
    )  # fmt: skip
    report = train(model, batches, options, objective, learns, records=records)
    figures: dict[str, Any] = {"adapt": {**report_metrics(report), "loss": settings.loss, "data": summary}}
    notes = [f"{len(rows)} new rows learnt in {report.steps} steps"]
    if initial is not None:
        learnt = bits_per_byte(head, tokenizer, held_out, run.device)
        figures["bpb_initial"], figures["bpb_adapted"] = round(initial, 6), round(learnt, 6)
        if learnt >= initial:
            notes = [f"the training did not help ({initial:.4f} to {learnt:.4f} bits per byte): new rows stay as made"]
            return Adapted({}, figures, training_reports(report, run.step), tuple(notes))
    learnt_rows = {
        name: tensor.detach()[list(rows)].float().cpu().clone()
        for parameter in learns
        for name, tensor in stored_tensors(after, model, parameter).items()
    }
    return Adapted(learnt_rows, figures, training_reports(report, run.step), tuple(notes))


def _text_steps(
    after: Checkpoint, model: Any, tokenizer: Any, settings: AdaptSettings, run: Run
) -> tuple[Steps, dict[str, Any]]:
    """Packed texts."""
    assert settings.data is not None
    window = min(settings.tokens, window_of(after, model))
    data = settings.data.model_copy(update={"learn": "all", "pack": True, "max_tokens": window, "kind": "text"})
    dataset = load_data(data, tokenizer, window=window, seed=run.seed_for("adapt"))
    return batches_of(dataset.examples, settings, run), dataset.summary()


def _tables(after: Checkpoint, model: Any, tables: Sequence[str], rows: Sequence[int]) -> dict[str, Trainable]:
    """The tables by the name of the model's parameter."""
    wanted = set(tables)
    found: dict[str, Trainable] = {}
    for name, parameter in model.named_parameters():
        try:
            stored = stored_tensors(after, model, name)
        except Unsupported:
            continue
        if list(stored) and set(stored) <= wanted:
            found[name] = Trainable(parameter, tuple(rows))
            wanted -= set(stored)
    if wanted:
        raise Unsupported("the model's class holds this table otherwise than the checkpoint", where=sorted(wanted)[0],
                          remedy="leave adapt out")  # fmt: skip
    return found
