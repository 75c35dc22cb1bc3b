"""What needs the model: bits per byte before and after, and the training of the new rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.data.settings import DataSettings
from regraft.core.patch import Edit, Patch
from regraft.core.training.head import Head
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.adapt import adapt
from regraft.plugins.tokenizer_retrofit.bits import ALL, bits_by_name, passage_bytes, passages
from regraft.plugins.tokenizer_retrofit.body_places import unchanged
from regraft.plugins.tokenizer_retrofit.corpus import Corpus
from regraft.plugins.tokenizer_retrofit.logits import KeptLogits
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
        TransformationError: a kept token has other logits than before.
    """
    refuse_untrusted_code(before, trust=run.trust)
    texts = {} if params.held_out is None else _held_out(params.held_out, passage_bytes(before.config))
    fresh = [index for index, origin in enumerate(new.origins) if origin.kept is None and index in new.tokenizer.tokens]
    learns = params.adapt is not None and bool(fresh)
    bits: dict[str, dict[str, float]] = {}
    said: KeptLogits | None = None
    for name, checkpoint in (("before", before), ("initial", after)) if texts else ():
        if name == "initial" and learns:
            continue  # measured with the model that then learns
        run.tell(f"bits per byte of {sum(map(len, texts.values()))} held-out passages, {name}")
        model = run.model(checkpoint)
        if said is None:
            said = KeptLogits.of(model, old, new)
        else:
            said.check(model)
        bits[name] = bits_by_name(Head.of(model), run.tokenizer(checkpoint), texts, run.device)
    notes, figures, reports = patch.notes, dict[str, Any](), dict[str, FileRef]()
    if params.adapt is not None:
        patch = replace(patch, edits={**patch.edits, **unchanged(before, params.adapt.body)})
    if params.adapt is not None and not fresh:
        notes = (*notes, "no token is new, so nothing was learnt")
    elif params.adapt is not None:
        settings = params.adapt.model_copy(update={"data": params.adapt.data or params.corpus})
        names = [name for role, name in tables.by_role().items() if role != "bias"]
        adapted = adapt(before, after, old, new.tokenizer, names, fresh, settings, texts, run,
                        check=said.check if said is not None else None)  # fmt: skip
        bits |= adapted.bits
        figures, reports, notes = adapted.figures, adapted.reports, (*notes, *adapted.notes)
        patch = _with_rows(before, patch, tables, new, fresh, adapted.learnt)
        patch = replace(patch, edits={**patch.edits, **adapted.body})
    if bits:
        figures |= _bits_figures(bits, list(texts))
        last = figures.get("bpb_adapted", figures["bpb_initial"])
        notes = (*notes, f"bits per byte of the held-out texts: {figures['bpb_before']:.4f} before, {last:.4f} now")
    return replace(patch, notes=notes), figures, reports


def _bits_figures(bits: Mapping[str, Mapping[str, float]], files: Sequence[str]) -> dict[str, Any]:
    """JSON values: of all texts together, and by file."""
    whole = {f"bpb_{name}": round(found[ALL], 6) for name, found in bits.items()}
    by_file = {file: {name: round(found[file], 6) for name, found in bits.items()} for file in files}
    return {**whole, "bpb_by_file": by_file}


def _held_out(data: DataSettings, nbytes: int) -> dict[str, list[str]]:
    """Passages of so many bytes by the name of their file."""
    found: dict[str, list[str]] = {}
    for name, text in Corpus(data, HELD_OUT_BYTES).named_texts():
        found.setdefault(name, []).extend(passages([text], nbytes=nbytes))
    return found


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
        made = Rows(parts, None, rows)
        made.check_copies(name, new.origins)
        edits[name] = Edit(spec, made.operation(name, spec.rows - len(parts)))
    return replace(patch, edits=edits)
