"""Plan and apply: the new vocabulary, the tables that follow it, and every file that names a token."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import Unsupported
from regraft.core.jsonio import dump
from regraft.core.patch import Edit, Outline, Patch, overlay
from regraft.core.training.footprint import state_bytes, training_bytes
from regraft.core.transformation import Run
from regraft.core.verify.structure import TOKENIZER
from regraft.plugins.tokenizer_retrofit.body_places import body_numbers, body_slots, body_specs
from regraft.plugins.tokenizer_retrofit.donor import open_donor
from regraft.plugins.tokenizer_retrofit.donor_special import adoptable, adopted, check_templates, role_ids
from regraft.plugins.tokenizer_retrofit.followers import check_followers
from regraft.plugins.tokenizer_retrofit.initial import Initial
from regraft.plugins.tokenizer_retrofit.metadata import metadata, movable, token_ids_of
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from regraft.plugins.tokenizer_retrofit.passages import passage_bytes
from regraft.plugins.tokenizer_retrofit.proof import PROBES, check_base, prove
from regraft.plugins.tokenizer_retrofit.report import (
    FERTILITY,
    TABLES,
    fertility_by_file,
    picture,
    tables_page,
    untried,
)
from regraft.plugins.tokenizer_retrofit.reserved import renamable, renamed, reserved_places
from regraft.plugins.tokenizer_retrofit.sources import check_source, corpus_of, make_vocabulary, most_rows
from regraft.plugins.tokenizer_retrofit.superwords import check_superwords
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

ID_MAP, REPORT = "id_map.json", "retrofit_report.json"
_FP32 = 4
_KEPT_TOKENS = 32 * (len(PROBES) + 1)
"""Those of texts, and once more as they are computed, whose logits are held from before the step until it is tried."""


def check(checkpoint: Checkpoint, params: TokenizerRetrofitParams) -> None:
    """Refuse what headers, config and tokenizer.json show to be impossible."""
    old = TokenizerFile.of(checkpoint)
    tables = Tables.of(checkpoint, old)
    check_followers(checkpoint, tables)
    if not tables.causal and params.needs_model:
        raise Unsupported("this model does not predict the next token", where=checkpoint.label,
                          found=checkpoint.config.get("model_type"),
                          remedy=f"leave {' and '.join(params.needs_model)} out")  # fmt: skip
    check_source(params)
    reserved_places(checkpoint, old, params)
    if params.donor is not None and params.special == "donor":
        check_templates(checkpoint, old, open_donor(params.donor))
    if params.boundary == "none":
        check_superwords(checkpoint, old)
    if params.adapt is not None and params.adapt.body is not None:
        body_slots(checkpoint, params.adapt.body)


def outline(checkpoint: Checkpoint, params: TokenizerRetrofitParams) -> Outline:
    """The most rows that there may be; how many there are is known when the vocabulary is made."""
    old = TokenizerFile.of(checkpoint)
    tables = Tables.of(checkpoint, old)
    rows = padded(most_rows(old, tables, params), params.pad_to_multiple_of)
    changes = metadata(checkpoint, rows)
    body = params.adapt.body if params.adapt is not None else None
    specs = {**tables.specs(checkpoint, rows), **body_specs(checkpoint, body)}
    memory = 4 * max(checkpoint.specs[tables.embeddings].nbytes, specs[tables.embeddings].nbytes)
    disk = 0
    if params.proof == "model":
        own = tables.specs(checkpoint, rows)
        tall = sum(math.prod(spec.shape) for spec in own.values() if len(spec.shape) == 2)
        trained = tall + body_numbers(checkpoint, body) if params.adapt is not None else 0
        tokens = passage_bytes(checkpoint) + 1
        if params.adapt is not None:
            tokens = max(tokens, params.adapt.tokens * params.adapt.batch_size)
        more = max(0, tall - sum(math.prod(checkpoint.specs[name].shape) for name in own))
        memory += training_bytes(checkpoint, trained, tokens=tokens) + _FP32 * (more + _KEPT_TOKENS * tables.rows)
        disk = state_bytes(trained)
    moving = movable(checkpoint, padded=params.pad_to_multiple_of > 1)
    named = renamable(checkpoint) if params.reserved is not None else {}
    named |= adoptable(checkpoint) if params.special == "donor" else {}
    for name, keys in named.items():
        moving.setdefault(name, set()).update(keys)
    return Outline(
        specs=specs,
        json=changes.json,
        files={TOKENIZER: None},
        dropped=changes.dropped,
        notes=(f"{old.rows} tokens, and then at most {rows} rows",),
        exact=False,
        undecided={name: frozenset(keys) for name, keys in moving.items()},
        workspace_bytes=memory,
        memory_remedy='set proof = "files"' if params.proof == "model" and not params.needs_model else "",
        scratch_bytes=disk,
    )


def apply(checkpoint: Checkpoint, params: TokenizerRetrofitParams, run: Run) -> Patch:
    """Make the vocabulary and its rows, and prove tokenizer and model.

    Raises:
        InputError: the corpus is empty, no text, or has nothing to merge; a token's id is in doubt.
        Unsupported: the model may not run, because code of the checkpoint defines it.
        TransformationError: the tokenizer or the model does not do what it should; see `prove` and `measured`.
    """
    if params.proof == "model":
        from regraft.plugins.tokenizer_retrofit.measured import refuse_untrusted

        refuse_untrusted(checkpoint, params, run)
    old = TokenizerFile.of(checkpoint)
    tables = Tables.of(checkpoint, old)
    remarks = check_base(checkpoint, old, run)
    new = make_vocabulary(checkpoint, old, tables, params, run)
    patch = made_patch(checkpoint, tables, old, new, params, run)
    after = overlay(checkpoint, patch, by=run.step)
    corpus = corpus_of(params)
    proven = prove(checkpoint, after, old, new, corpus.texts() if corpus is not None else (), run)
    figures = {**new.figures, **new.counts(), **proven}
    if corpus is not None:
        figures["corpus"] = corpus.summary()
    words = fertility_by_file(corpus, old, new) if corpus is not None else {}
    reports: dict[str, FileRef] = {}
    if params.proof == "model":
        from regraft.plugins.tokenizer_retrofit.measured import measured

        patch, more, learnt = measured(checkpoint, after, patch, tables, old, new, params, run)
        figures |= more
        reports |= learnt
    else:
        asked = 'proof = "files"'
        figures["proof"] = untried(asked)
        patch = replace(patch, notes=(*patch.notes, f"not tried in the model: {asked}"))
    reports |= {
        ID_MAP: FileRef(data=_json(new.id_map(tables.rows))),
        REPORT: FileRef(data=_json(figures)),
        TABLES: FileRef(data=tables_page(run.step, figures, words)),
        **({FERTILITY: FileRef(data=picture(words))} if words else {}),
    }
    notes = (*patch.notes, *remarks, f"tables of tokens for each word and bits per byte: regraft/{run.step}/{TABLES}")
    return replace(patch, metrics=figures, reports=reports, notes=notes)


def made_patch(
    checkpoint: Checkpoint,
    tables: Tables,
    old: TokenizerFile,
    new: NewVocabulary,
    params: TokenizerRetrofitParams,
    run: Run,
) -> Patch:
    """Tables, tokenizer and configs, without proof."""
    total = padded(len(new.origins), params.pad_to_multiple_of)
    moved = new.new_id()
    gone = {old.ids[token] for token in new.taken}
    same = all(moved.get(index) == index for index in range(tables.rows) if index not in gone)
    roles = role_ids(checkpoint, old, new)
    changes = metadata(checkpoint, total, None if same else moved, total - len(new.origins), roles)
    named = renamed(checkpoint, new.tokenizer, new.taken) | adopted(checkpoint, new)
    specs = tables.specs(checkpoint, total)
    edits = {}
    by_role = tables.by_role()
    initial = Initial(old, new, params, run, {role: checkpoint.tensor(name) for role, name in by_role.items()})
    for role, name in by_role.items():
        rows = initial.rows(role)
        rows.check_copies(name, new.origins)
        edits[name] = Edit(specs[name], rows.operation(name, total - len(new.origins)))
    return Patch(
        edits=edits,
        json={**changes.json, **{name: {**changes.json.get(name, {}), **own} for name, own in named.items()}},
        files={TOKENIZER: FileRef(data=dump(new.tokenizer.document))},
        dropped=changes.dropped,
        notes=(*new.notes, *_newly_named(checkpoint, tables.rows, new)),
    )


def _newly_named(checkpoint: Checkpoint, rows: int, new: NewVocabulary) -> tuple[str, ...]:
    """A note where a config names an id that had no row, and that a new token has now."""
    ids = token_ids_of(checkpoint.config) | token_ids_of(checkpoint.generation_config)
    found = [f"{index} is {new.tokenizer.tokens[index]!r} now" for index in sorted(ids)
             if index >= rows and index in new.tokenizer.tokens]  # fmt: skip
    if not found:
        return ()
    return (f"the base's configs name ids beyond its {rows} rows, which new tokens have got: {', '.join(found)}",)


def padded(rows: int, multiple: int) -> int:
    """The next multiple, `rows` itself included."""
    return -(-rows // multiple) * multiple


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
