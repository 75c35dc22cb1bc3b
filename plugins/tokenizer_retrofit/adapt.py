"""Training of the new rows, and of low-rank factors beside the body where asked for; all else keeps its bytes.

A polish, not a cure (about a sixth of what a replaced vocabulary loses, then a plateau), and a rate that is too high
does harm: so bits per byte of held-out text decide whether what was learnt is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.load import load_data, prepare
from regraft.core.data.rows import BadRows
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
from regraft.plugins.tokenizer_retrofit.bits import ALL, bits_by_name
from regraft.plugins.tokenizer_retrofit.body import Body
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.likelihoods import LikelihoodMatching
from regraft.plugins.tokenizer_retrofit.params import AdaptSettings
from regraft.plugins.tokenizer_retrofit.spaces import space_tokens
from regraft.plugins.tokenizer_retrofit.teacher import batches_of, taught_steps
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    from regraft.core.checkpoint import FileRef
    from regraft.core.patch import Edit


@dataclass(frozen=True, eq=False)
class Adapted:
    """What the training came to.

    Args:
        learnt: [rows, d] fp32 by table; empty where bits per byte did not fall, so that the rows stay as made.
        body: of the body's weights; empty likewise, and where the body does not learn.
        bits: per byte by file and for `ALL`, with rows as made (`initial`) and as learnt (`adapted`).
        figures: JSON values.
        reports: curve and losses.
        notes: for the user.
    """

    learnt: dict[str, torch.Tensor]
    body: dict[str, Edit]
    bits: dict[str, dict[str, float]]
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
    corpus: Corpus | None,
    held_out: Mapping[str, Sequence[str]],
    run: Run,
    *,
    guarded: bool = True,
    check: Callable[[Any], None] | None = None,
) -> Adapted:
    """Learn the new rows, and what the settings say of the body.

    Args:
        before, after: the checkpoint without and with the new vocabulary.
        old, new: the tokenizers.
        tables: names of the embeddings and the head.
        rows: that learn, those of new tokens.
        settings: of the training.
        corpus: what is learnt where the settings name no data.
        held_out: passages by file, whose bits per byte are measured before and after.
        run: the run.
        guarded: whether what was learnt is given up where those did not fall.
        check: called with the model of `after` before it learns.

    Raises:
        RegraftError: as the training.
        Unsupported: the model's class holds a table otherwise than the checkpoint.
        InputError: for `alm`, no passage is spelt alike by both vocabularies.
    """
    tokenizer = run.tokenizer(after)
    taught: tuple[Steps, dict[str, Any]] | None = None
    if settings.loss == "alm":
        taught = taught_steps(before, Cutter(tokenizer, new), old, settings, _corpus(settings, corpus), run)
    model = run.model(after)
    if check is not None:
        check(model)
    head = Head.of(model)
    learns = _tables(after, model, tables, rows)
    body = None if settings.body is None else Body(model, before, settings.body, run.seed_for("body"))
    bits = {"initial": bits_by_name(head, tokenizer, held_out, run.device)} if held_out else {}
    batches, summary = taught if taught is not None else _text_steps(after, model, tokenizer, settings, corpus, run)
    spaces = space_tokens(new) if taught is not None and settings.append_space else None
    objective: Objective = CrossEntropy(head) if taught is None else LikelihoodMatching(head, spaces)
    options = TrainSettings(
        lr=settings.lr, warmup_steps=min(settings.warmup_steps, len(batches)), schedule=settings.schedule,
        betas=(0.9, 0.95), precision=settings.precision, seed=run.seed_for("training"),
    )  # fmt: skip
    records = Records(
        state=run.state / "adapt" if run.state else None, listen=telling(run.tell),
        identity={"base": after.digest, "taught by": before.digest, "scale": 1.0 if body is None else body.scale},
    )  # fmt: skip
    with nullcontext() if body is None else body.attached():
        learning = {**learns, **({} if body is None else body.trainable())}
        report = train(model, batches, options, objective, learning, records=records)
    figures: dict[str, Any] = {"adapt": {**report_metrics(report), "loss": settings.loss, "data": summary}}
    if body is not None:
        figures["adapt"]["body"] = {**body.figures(), "lost_to_rounding": round(body.merge(), 6)}
    also = "" if body is None else f", and factors beside {len(body.pairs)} weights of the body, which are merged"
    note = f"{len(rows)} new rows learnt in {report.steps} steps{also}"
    reports = training_reports(report, run.step)
    if bits:
        bits["adapted"] = bits_by_name(head, tokenizer, held_out, run.device)
        initial, learnt = bits["initial"][ALL], bits["adapted"][ALL]
        if guarded and learnt >= initial:
            note = f"the training did not help ({initial:.4f} to {learnt:.4f} bits per byte): the model stays as made"
            return Adapted({}, {}, bits, figures, reports, (note,))
    learnt_rows = {
        name: tensor.detach()[list(rows)].float().cpu().clone()
        for parameter in learns
        for name, tensor in stored_tensors(after, model, parameter).items()
    }
    return Adapted(learnt_rows, {} if body is None else body.edits(), bits, figures, reports, (note,))


def _text_steps(
    after: Checkpoint, model: Any, tokenizer: Any, settings: AdaptSettings, corpus: Corpus | None, run: Run
) -> tuple[Steps, dict[str, Any]]:
    """Packed texts."""
    window, seed = min(settings.tokens, window_of(after, model)), run.seed_for("adapt")
    packed = {"learn": "all", "pack": True, "max_tokens": window, "kind": "text"}
    if settings.data is not None:
        dataset = load_data(settings.data.model_copy(update=packed), tokenizer, window=window, seed=seed)
        return batches_of(dataset.examples, settings, run), dataset.summary()
    texts = _corpus(settings, corpus)
    data = texts.data.model_copy(update={**packed, "columns": {}, "max_rows": None})
    bad = BadRows(texts.data.max_bad_rows)
    dataset = prepare(texts.rows(bad), data, tokenizer, window=window, seed=seed, bad=bad)
    return batches_of(dataset.examples, settings, run), {**dataset.summary(), "files": texts.summary()}


def _corpus(settings: AdaptSettings, corpus: Corpus | None) -> Corpus:
    """What is learnt, as texts."""
    own = corpus if settings.data is None else Corpus(settings.data)
    assert own is not None
    return own


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
