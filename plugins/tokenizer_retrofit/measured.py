"""What needs the model: bits per byte before and after, and the training of the new rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.patch import Edit, Patch
from regraft.core.training.head import Head
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.adapt import adapt
from regraft.plugins.tokenizer_retrofit.bits import bits_per_byte, passages
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from regraft.plugins.tokenizer_retrofit.rows import Rows
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

HELD_OUT_BYTES = 100_000
"""Of the held-out texts that are measured."""


def measured(
    before: Checkpoint,
    after: Checkpoint,
    patch: Patch,
    tables: Tables,
    old: TokenizerFile,
    new: NewVocabulary,
    params: TokenizerRetrofitParams,
    run: Run,
) -> tuple[Patch, dict[str, Any], dict[str, FileRef]]:
    """The patch with learnt rows where they help, figures and reports.

    Args:
        before, after: the checkpoint without and with the new vocabulary.
        patch: what made it.
        tables: of the vocabulary.
        old: the old tokenizer.
        new: the vocabulary.
        params: of the step.
        run: the run.

    Raises:
        RegraftError: as `adapt`; the model or the texts cannot be read.
    """
    refuse_untrusted_code(before, trust=run.trust)
    texts: list[str] = []
    figures: dict[str, Any] = {}
    notes: list[str] = []
    if params.held_out is not None:
        texts = passages(list(Corpus(params.held_out, HELD_OUT_BYTES).texts()))
        for name, checkpoint in (("bpb_before", before), ("bpb_initial", after)):
            if name == "bpb_initial" and params.adapt is not None:
                continue
            run.tell(f"bits per byte of {len(texts)} held-out passages, {name.removeprefix('bpb_')}")
            tokenizer = run.tokenizer(checkpoint)
            found = bits_per_byte(Head.of(run.model(checkpoint)), tokenizer, texts, run.device)
            figures[name] = round(found, 6)
    reports: dict[str, FileRef] = {}
    fresh = [index for index, origin in enumerate(new.origins) if origin.kept is None and index in new.tokenizer.tokens]
    if params.adapt is not None and fresh:
        settings = params.adapt.model_copy(update={"data": params.adapt.data or params.corpus})
        names = [name for role, name in tables.by_role().items() if role != "bias"]
        adapted = adapt(before, after, old, new.tokenizer, names, fresh, settings, texts, run)
        figures |= adapted.figures
        reports |= adapted.reports
        notes += adapted.notes
        patch = _with_rows(before, patch, tables, new, fresh, adapted.learnt)
    if "bpb_before" in figures:
        last = figures.get("bpb_adapted", figures.get("bpb_initial"))
        notes.append(f"bits per byte of the held-out texts: {figures['bpb_before']:.4f} before, {last:.4f} now")
    return replace(patch, notes=(*patch.notes, *notes)), figures, reports


def _with_rows(
    before: Checkpoint, patch: Patch, tables: Tables, new: NewVocabulary, fresh: list[int], learnt: dict[str, Any]
) -> Patch:
    """The patch with learnt rows of some tables in place of those that were made."""
    place = {index: tables.rows + number for number, index in enumerate(fresh)}
    edits = dict(patch.edits)
    for name, rows in learnt.items():
        parts = [
            [origin.kept] if origin.kept is not None else [place[index]] if index in place else []
            for index, origin in enumerate(new.origins)
        ]
        spec = edits[name].spec
        assert before.specs[name].rows == tables.rows
        edits[name] = Edit(spec, Rows(parts, None, rows).operation(name, spec.rows - len(parts)))
    return replace(patch, edits=edits)
