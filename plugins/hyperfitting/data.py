"""The sequences: read, cut to one length, drawn, and set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from regraft.core.data.examples import Example
from regraft.core.data.load import Dataset, load_data
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError, UsageError
from regraft.core.transformation import Run
from regraft.plugins.hyperfitting.params import HyperfittingParams


@dataclass(frozen=True)
class Material:
    """What a run reads.

    Args:
        training: sequences of exactly `seq_len` tokens.
        held_out: likewise; may be empty.
        summary: where they come from, as JSON values.
        notes: what the user should know of them.
    """

    training: Sequence[Example]
    held_out: Sequence[Example]
    summary: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_material(params: HyperfittingParams, tokenizer: Any, window: int, run: Run) -> Material:
    """Read the data, draw the sequences.

    Raises:
        InputError: data cannot be read, is empty, or nothing is left to train on.
        UsageError: `seq_len` exceeds the window, or rows are preference pairs.
    """
    dataset = _load(params.data, params, tokenizer, window, run.seed_for("data"))
    summary: dict[str, Any] = {"data": dataset.summary()}
    examples = _texts(dataset, params.data)
    kept = 0
    if params.own_held_out is None:
        kept = _held_out_count(params, len(examples))
    count = min(len(examples), params.samples + kept)
    if count - kept < params.batch_size:
        raise InputError(
            "there are fewer sequences than a batch takes",
            where="data",
            expected=f"at least {params.batch_size} sequences of {params.seq_len} tokens to train on",
            found=f"{len(examples)} in the data" + (f", {kept} of which are to be held out" if kept else ""),
            remedy="give more data, or lower batch_size, seq_len or held_out",
        )
    drawn = Random(run.seed_for("draw")).sample(examples, count)
    held_out, training = drawn[:kept], drawn[kept:]
    if params.own_held_out is not None:
        other = _load(params.own_held_out, params, tokenizer, window, run.seed_for("held-out"))
        held_out, summary["held_out_data"] = _texts(other, params.own_held_out), other.summary()
    summary |= {"training_sequences": len(training), "held_out_sequences": len(held_out)}
    return Material(training, held_out, summary, tuple(_notes(params, dataset, len(training))))


def _load(settings: DataSettings, params: HyperfittingParams, tokenizer: Any, window: int, seed: int) -> Dataset:
    forced: dict[str, Any] = {"max_tokens": params.seq_len, "pack": params.pack}
    if not params.pack:
        forced |= {"min_tokens": params.seq_len, "too_long": "truncate"}
    if "learn" not in settings.model_fields_set:
        forced["learn"] = "all"
    try:
        return load_data(settings.model_copy(update=forced), tokenizer, window=window, seed=seed)
    except UsageError as error:
        if error.where == "pack":  # what core says of pairs that are to be packed; here packing is no wish of the user
            raise _pairs(settings) from None
        raise


def _texts(dataset: Dataset, settings: DataSettings) -> list[Example]:
    texts = [one for one in dataset.examples if isinstance(one, Example)]
    if len(texts) < len(dataset.examples):
        raise _pairs(settings)
    return texts


def _pairs(settings: DataSettings) -> UsageError:
    return UsageError(
        "preference pairs are no texts to learn",
        where=", ".join(settings.sources),
        expected="texts, chats, or prompts with completions",
        remedy='name the column to learn: kind = "text", columns = { text = "chosen" }',
    )


def _held_out_count(params: HyperfittingParams, available: int) -> int:
    """Sequences to set aside: so many, or a share of those drawn, at least one."""
    if isinstance(params.held_out, float):
        return max(1, round(params.held_out * min(params.samples, available)))
    assert isinstance(params.held_out, int)
    return params.held_out


def _notes(params: HyperfittingParams, dataset: Dataset, training: int) -> list[str]:
    notes = []
    if training < params.samples:
        notes.append(f"the data gives {training} sequences of {params.seq_len} tokens, of {params.samples} asked for")
    if left := training % params.batch_size if training > params.batch_size else 0:
        notes.append(f"{left} of {training} sequences are left out of each epoch, others each time: they fill no batch")
    if dataset.bad:
        notes.append(f"{len(dataset.bad)} rows of the data cannot be used, the first: {dataset.bad[0].reason}")
    return notes
