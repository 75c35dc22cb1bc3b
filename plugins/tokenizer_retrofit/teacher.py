"""The old model as a teacher: one pass over the texts that the steps come to, before the new model is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.examples import Example, PreferenceExample
from regraft.core.errors import InputError
from regraft.core.training.head import Head
from regraft.core.training.model import memory, window_of
from regraft.core.training.modes import computing, resolve_precision, without_dropout
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.alignment import Aligned, Cutter, aligned_texts
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.likelihoods import ChunkSteps, teacher_log_probs
from regraft.plugins.tokenizer_retrofit.params import AdaptSettings
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile


def taught_steps(
    before: Checkpoint, learner: Cutter, old: TokenizerFile, settings: AdaptSettings, run: Run
) -> tuple[ChunkSteps, dict[str, Any]]:
    """The steps with what the old model says of their chunks; its weights are gone afterwards.

    Args:
        before: the checkpoint of the old vocabulary, `old`.
        learner: the new tokenizer.
        old: see `before`.
        settings: of the training.
        run: the run.

    Returns:
        The steps, and a summary of the data; JSON values.

    Raises:
        InputError: no passage is spelt alike by both vocabularies, or there are fewer than a batch takes.
    """
    assert settings.data is not None
    model = run.model(before)
    window = window_of(before, model)
    corpus = Corpus(settings.data)
    passages = list(
        aligned_texts(corpus.texts(), Cutter(run.tokenizer(before), old), learner,
                      tokens=min(settings.tokens, window), window=window)
    )  # fmt: skip
    texts = [one for one in passages if one is not None]
    if not texts:
        raise InputError("the two vocabularies spell no passage with the same bytes", where="adapt",
                         found=f"{len(passages)} passages", remedy='use loss = "clm"')  # fmt: skip
    batches = batches_of([text.new.example for text in texts], settings, run)
    needed = sorted({index for step in range(len(batches)) for index in batches.indices(step)})
    run.tell(f"the old model reads {len(needed)} passages")
    wanted = _said(Head.of(model), {index: texts[index] for index in needed}, settings.precision, run.device)
    chunks = sum(text.count for text in texts)
    summary = {"files": corpus.summary(), "passages": len(texts), "left_out": len(passages) - len(texts)}
    return ChunkSteps(batches, texts, wanted), {**summary, "chunks": chunks}


def batches_of(examples: Sequence[Example | PreferenceExample], settings: AdaptSettings, run: Run) -> Batches:
    """The steps of the training, over examples."""
    order = BatchSettings(batch_size=settings.batch_size, epochs=settings.epochs, steps=settings.steps)
    return Batches(examples, order, run.seed_for("order"), run.rank, run.world)


def _said(head: Head, texts: dict[int, Aligned], precision: str, device: str) -> dict[int, torch.Tensor]:
    """What the model says of each text's chunks."""
    computed = resolve_precision(precision, device)
    kind = torch.device(device).type
    with torch.no_grad(), without_dropout(head.model), memory("the old model"), computing(kind, computed):
        return {index: teacher_log_probs(head, text, device) for index, text in texts.items()}
