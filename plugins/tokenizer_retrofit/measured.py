"""What needs the model: kept logits and written tokens, bits per byte, and the training of the new rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import InputError, RegraftError, ResourceError, TransformationError, Unsupported, first_line
from regraft.core.patch import Edit, Patch
from regraft.core.training.head import Head
from regraft.core.training.model import memory
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.adapt import adapt
from regraft.plugins.tokenizer_retrofit.bits import ALL, bits_by_name
from regraft.plugins.tokenizer_retrofit.body_places import unchanged
from regraft.plugins.tokenizer_retrofit.loading import Loaded, load
from regraft.plugins.tokenizer_retrofit.logits import KeptLogits
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from regraft.plugins.tokenizer_retrofit.passages import window_tokens
from regraft.plugins.tokenizer_retrofit.report import untried
from regraft.plugins.tokenizer_retrofit.rows import Rows
from regraft.plugins.tokenizer_retrofit.sources import corpus_of
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.texts import Texts, texts_of
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.vocabulary import NewVocabulary

FILES = 'proof = "files"'
_REMEDY = f"set {FILES}, which tries no model"

Bits = dict[str, dict[str, float]]
"""Per byte by state (`before`, `initial`, `adapted`), by file and for `ALL`."""


@dataclass(frozen=True, eq=False)
class Before:
    """What the model was before the step.

    Args:
        said: of kept tokens.
        bits: per byte by file; None where it does not predict the next token.
        unknown: tensors that its class does not know.
        kind: its class.
    """

    said: KeptLogits
    bits: dict[str, float] | None
    unknown: frozenset[str]
    kind: str


def refuse_untrusted(before: Checkpoint, params: TokenizerRetrofitParams, run: Run) -> None:
    """Refuse a model that its own code defines, and that may not run.

    Raises:
        Unsupported: with what to do.
    """
    try:
        refuse_untrusted_code(before, trust=run.trust)
    except Unsupported as error:
        remedy = error.remedy if params.needs_model else f"{error.remedy}; or {_REMEDY}"
        raise Unsupported(error.message, where=error.where, found=error.found, remedy=remedy) from None


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
        RegraftError: as `adapt`; the texts cannot be read; the base's model cannot be run, and the parameters need it,
            or the run is strict.
        TransformationError: a kept token has other logits than before, the new model does not load or writes what is
            no token, or bits per byte rise by more than they may.
    """
    texts = texts_of(params, before)
    try:
        with _short_of_memory(params):
            was = _before(before, tables, old, new, texts, run)
    except (InputError, Unsupported) as error:
        if params.needs_model or run.strict:
            raise
        why = f"{error.message}{f': {error.found}' if error.found else ''}"
        return replace(patch, notes=(*patch.notes, f"not tried in the model: {why}")), {"proof": untried(why)}, {}
    if was.bits is None and params.needs_model:
        raise Unsupported("this model does not predict the next token", where=before.label, found=was.kind,
                          remedy="leave adapt, held_out and max_bpb_increase out")  # fmt: skip
    fresh = [index for index, origin in enumerate(new.origins) if origin.kept is None and index in new.tokenizer.tokens]
    bits: Bits = {} if was.bits is None else {"before": was.bits}
    now = "initial"
    notes, figures, reports = [*patch.notes], {"proof": _tried(was, texts)}, dict[str, FileRef]()
    if params.adapt is not None and fresh:
        names = [name for role, name in tables.by_role().items() if role != "bias"]
        adapted = adapt(before, after, old, new.tokenizer, names, fresh, params.adapt, corpus_of(params),
                        texts.passages, run, guarded=texts.kind == "held-out", check=was.said.check)  # fmt: skip
        bits |= adapted.bits
        now = "adapted" if adapted.learnt else "initial"
        figures |= adapted.figures
        reports |= adapted.reports
        notes += adapted.notes
        patch = _with_rows(before, patch, tables, new, fresh, adapted.learnt)
        patch = replace(patch, edits={**patch.edits, **adapted.body})
    else:
        with _short_of_memory(params):
            found = _after(after, was, tables, texts, run)
        bits |= {} if found is None else {"initial": found}
        notes += ["no token is new, so nothing was learnt"] if params.adapt is not None else []
    if params.adapt is not None:
        patch = replace(patch, edits={**unchanged(before, params.adapt.body), **patch.edits})
    if bits:
        figures |= _bits_figures(bits, texts)
        _check_rise(bits["before"][ALL], bits[now][ALL], texts, params)
    notes += _notes(was, texts, bits, now)
    return replace(patch, notes=tuple(notes)), figures, reports


def _before(
    before: Checkpoint, tables: Tables, old: TokenizerFile, new: NewVocabulary, texts: Texts, run: Run
) -> Before:
    """Raises Unsupported or InputError where the model cannot be run."""
    run.tell("trying the model with the old vocabulary")
    loaded, tokenizer = load(before, run, causal=tables.causal), run.tokenizer(before)
    model = loaded.model
    with _running(Unsupported("the model cannot be run", where=before.label, remedy=_REMEDY)):
        said = KeptLogits.of(model, old, new, window=window_tokens(before), causal=tables.causal)
        predicts = tables.causal and said.logits and model.can_generate()
        bits = bits_by_name(Head.of(model), tokenizer, texts.passages, run.device) if predicts else None
    return Before(said, bits, loaded.unknown, type(model).__name__)


def _after(after: Checkpoint, was: Before, tables: Tables, texts: Texts, run: Run) -> dict[str, float] | None:
    """Bits per byte of the model with the rows as made, which says of kept tokens what it said before."""
    run.tell("trying the model with the new vocabulary")
    loaded = _loaded(after, was, tables, run)
    with _running(TransformationError("the model with the new vocabulary cannot be run", where=after.label)):
        was.said.check(loaded.model)
        if was.bits is None:
            return None
        return bits_by_name(Head.of(loaded.model), run.tokenizer(after), texts.passages, run.device)


def _loaded(after: Checkpoint, was: Before, tables: Tables, run: Run) -> Loaded:
    message = "the model with the new vocabulary does not load as that with the old one did"
    try:
        loaded = load(after, run, causal=tables.causal)
    except (InputError, Unsupported) as error:
        raise TransformationError(message, where=after.label, found=f"{error.message}: {error.found}") from None
    if stray := sorted(loaded.unknown - was.unknown):
        raise TransformationError(message, where=stray[0], expected="a tensor that its class knows")
    return loaded


@contextmanager
def _running(refusal: RegraftError) -> Iterator[None]:
    """Turns what a model's own forward pass raises into `refusal`, with the first line of it.

    Raises:
        RegraftError: that, or what is one already.
        ResourceError: memory is short.
    """
    try:
        with memory("trying the model"):
            yield
    except RegraftError:
        raise
    except Exception as error:  # classes raise what they like where an input, a kernel or a package is missing
        refusal.found = first_line(error)
        raise refusal from None


@contextmanager
def _short_of_memory(params: TokenizerRetrofitParams) -> Iterator[None]:
    """Names what needs less memory where it is short."""
    try:
        yield
    except ResourceError as error:
        remedy = "use a machine, or a --device, with more memory"
        remedy = remedy if params.needs_model else f"{_REMEDY}; or {remedy}"
        raise ResourceError(error.message, where=error.where, found=error.found, remedy=remedy) from None


def _tried(was: Before, texts: Texts) -> dict[str, Any]:
    """JSON values: the class, texts whose logits (or hidden states) were compared, tokens written, texts measured."""
    return {
        "model": was.kind,
        "kept_logits" if was.said.logits else "kept_states": len(was.said.probes),
        "greedy_tokens": was.said.writes if was.said.stray is None else 0,
        "bits_per_byte": None if was.bits is None else texts.kind,
    }


def _notes(was: Before, texts: Texts, bits: Bits, now: str) -> Iterator[str]:
    said = was.said
    outputs = "logits" if said.logits else "last hidden states"
    writing = f"; {said.writes} tokens written" if said.writes else "; it writes no text, so none was tried"
    yield f"tried in the model ({was.kind}): {outputs} of kept tokens on {len(said.probes)} texts, as before{writing}"
    if not said.probes:
        yield f"no token of the built-in texts is kept, so no {outputs} were compared"
    if said.stray is not None:
        yield f"the base itself writes ids that are no tokens ({said.stray}), so they were not held against the result"
    if bits:
        yield f"bits per byte of {texts.label}: {bits['before'][ALL]:.4f} before, {bits[now][ALL]:.4f} now"
    else:
        yield "bits per byte were not measured: the model does not predict the next token"


def _bits_figures(bits: Mapping[str, Mapping[str, float]], texts: Texts) -> dict[str, Any]:
    """JSON values: of all texts together, and by file."""
    whole = {f"bpb_{name}": round(found[ALL], 6) for name, found in bits.items()}
    by_file = {file: {name: round(found[file], 6) for name, found in bits.items()} for file in texts.passages}
    return {**whole, "bpb_by_file": by_file, "bpb_texts": texts.kind}


def _check_rise(before: float, now: float, texts: Texts, params: TokenizerRetrofitParams) -> None:
    most = params.max_bpb_increase
    if most is not None and not now - before <= most:
        raise TransformationError(
            "bits per byte rise by more than max_bpb_increase", where=texts.label,
            expected=f"at most {before + most:.4f}", found=f"{now:.4f}, and {before:.4f} before",
            remedy="let the new rows learn (adapt), keep the old tokens (extend), or allow more",
        )  # fmt: skip


def _with_rows(
    before: Checkpoint, patch: Patch, tables: Tables, new: NewVocabulary, fresh: Sequence[int], learnt: dict[str, Any]
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
