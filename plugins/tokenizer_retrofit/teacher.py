"""The old model as a teacher: one pass over the texts that the steps come to, before the new model is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from random import Random
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
from regraft.plugins.tokenizer_retrofit.alignment import Aligned, Cutter, aligned_texts, cut
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.likelihoods import ChunkSteps, teacher_log_probs
from regraft.plugins.tokenizer_retrofit.params import AdaptSettings
from regraft.plugins.tokenizer_retrofit.spaces import space_tokens
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

_SPARE = 2
"""Passages drawn for each that is needed."""


def taught_steps(
    before: Checkpoint, learner: Cutter, old: TokenizerFile, settings: AdaptSettings, corpus: Corpus, run: Run
) -> tuple[ChunkSteps, dict[str, Any]]:
    """The steps with what the old model says of their chunks; its weights are gone afterwards.

    Args:
        before: the checkpoint of the old vocabulary, `old`.
        learner: the new tokenizer.
        old: see `before`.
        settings: of the training.
        corpus: what is learnt.
        run: the run.

    Returns:
        The steps, and a summary of the data; JSON values.

    Raises:
        InputError: no passage is spelt alike by both vocabularies, or there are fewer than a batch takes.
    """
    model = run.model(before)
    window = window_of(before, model)
    tokens = min(settings.tokens, window)
    most = None if settings.steps is None else settings.steps * settings.batch_size
    sample = drawn(cut(corpus.texts(), tokens), most, run.seed_for("passages"))
    aligned = aligned_texts(sample, Cutter(run.tokenizer(before), old), learner, tokens=tokens, window=window)
    texts, left_out = _first(aligned, most)
    if not texts:
        raise InputError("the two vocabularies spell no passage with the same bytes", where="adapt",
                         found=f"{left_out} passages", remedy='use loss = "clm"')  # fmt: skip
    batches = batches_of([text.new.example for text in texts], settings, run)
    needed = sorted({index for step in range(len(batches)) for index in batches.indices(step)})
    run.tell(f"the old model reads {len(needed)} passages")
    said = _said(Head.of(model), {index: texts[index] for index in needed}, old, settings, run.device)
    texts = [said[index][0] if index in said else text for index, text in enumerate(texts)]
    wanted = {index: log_probs for index, (_, log_probs) in said.items()}
    chunks = sum(texts[index].count for index in needed)
    summary = {"files": corpus.summary(), "passages": len(texts), "left_out": left_out, "chunks": chunks}
    return ChunkSteps(batches, texts, wanted), summary


def drawn(passages: Iterable[str], most: int | None, seed: int) -> list[str]:
    """A sample of the passages, each as likely as any other, with some to spare for those that are left out.

    Args:
        passages: streamed; no more than the sample is held.
        most: that are needed; None takes all, in order.
        seed: of the draw.
    """
    size, generator = None if most is None else _SPARE * most, Random(seed)
    held: list[str] = []
    for number, passage in enumerate(passages):
        if size is None or number < size:
            held.append(passage)
        elif (place := generator.randrange(number + 1)) < size:
            held[place] = passage
    if size is not None:
        generator.shuffle(held)  # what was never replaced stands where the corpus had it
    return held


def _first(texts: Iterable[Aligned | None], most: int | None) -> tuple[list[Aligned], int]:
    """So many texts, or all, and how many were passed over because they are not aligned."""
    found: list[Aligned] = []
    left_out = 0
    for text in texts:
        if text is None:
            left_out += 1
            continue
        found.append(text)
        if len(found) == most:
            break
    return found, left_out


def batches_of(examples: Sequence[Example | PreferenceExample], settings: AdaptSettings, run: Run) -> Batches:
    """The steps of the training, over examples."""
    order = BatchSettings(batch_size=settings.batch_size, epochs=settings.epochs, steps=settings.steps)
    return Batches(examples, order, run.seed_for("order"), run.rank, run.world)


def _said(
    head: Head, texts: Mapping[int, Aligned], old: TokenizerFile, settings: AdaptSettings, device: str
) -> dict[int, tuple[Aligned, torch.Tensor]]:
    """What the model says of each text's chunks."""
    computed, kind = resolve_precision(settings.precision, device), torch.device(device).type
    spaces = space_tokens(old) if settings.append_space or settings.join_below else None
    with torch.no_grad(), without_dropout(head.model), memory("the old model"), computing(kind, computed):
        return {
            index: teacher_log_probs(
                head, text, device, spaces=spaces, append_space=settings.append_space, join_below=settings.join_below
            )
            for index, text in texts.items()
        }
