"""Checks of what was written: what should not have changed, and what must be recorded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import CONFIG
from regraft.core.errors import RegraftError
from regraft.core.provenance import data_digests
from regraft.core.sources.folder import LOCK
from regraft.core.testing.checkpoints import read_tensors, same_bits, tree
from regraft.core.testing.conformance.check import NotApplicable, demand, named
from regraft.core.testing.conformance.subject import Applied, Case, Subject, tiny_base, unless_refused

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


def leaves_the_base_alone(subject: Subject) -> None:
    """Every file of the base is what it was."""
    for family in subject.families:
        applied = subject.applied(family)
        before, after = tree(tiny_base(family)), tree(applied.case.base)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        demand(not changed, "the base was changed", where=family, found=named(changed),
               remedy="never write into the folder of a checkpoint: return a patch")  # fmt: skip


def leaves_other_tensors_alone(subject: Subject) -> None:
    """Tensors that the plan does not name have the bytes of the base."""
    for family in subject.families:
        applied = subject.applied(family)
        outline = applied.report.plan.steps[0].outline
        before, after = read_tensors(tiny_base(family)), read_tensors(applied.folder)
        moved = {**{name: name for name in before}, **outline.renames}
        kept = {new: old for new, old in moved.items() if new not in outline.specs and new in after}
        changed = [new for new, old in kept.items() if not same_bits({"x": before[old]}, {"x": after[new]})]
        demand(not changed, "tensors that the plan does not name have changed", where=family, found=named(changed),
               remedy="change tensors by edits alone, and base files never")  # fmt: skip


def leaves_other_keys_alone(subject: Subject) -> None:
    """Keys of config.json that the plan does not name are what they were, in their order."""
    for family in subject.families:
        applied = subject.applied(family)
        outline = applied.report.plan.steps[0].outline
        before, after = (json.loads((folder / CONFIG).read_text()) for folder in (applied.case.base, applied.folder))
        planned = {*outline.json.get(CONFIG, {}), *outline.undecided.get(CONFIG, ())}
        changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        demand(changed <= planned, "keys of config.json have changed that the plan does not name", where=family,
               expected=named(planned) or "no change", found=named(changed - planned),
               remedy='give the changed keys alone: Patch(json={"config.json": {...}})')  # fmt: skip
        order = [key for key in before if key in after]
        demand(order == [key for key in after if key in before], "the keys of config.json stand in another order",
               where=family, remedy="give the changed keys alone, not the whole file")  # fmt: skip


def keeps_the_tokenizer(subject: Subject) -> None:
    """Every file of the tokenizer is there, with the bytes of the base unless the plan names it."""
    for family in subject.families:
        applied = subject.applied(family)
        outline = applied.report.plan.steps[0].outline
        for name in TOKENIZER_FILES:
            before, after = applied.case.base / name, applied.folder / name
            if not before.exists() or name in outline.files or name in outline.json:
                continue
            demand(after.exists(), "a file of the tokenizer is gone", where=f"{family}: {name}",
                   remedy="leave it, or bring another: without it nobody can use the model")  # fmt: skip
            demand(before.read_bytes() == after.read_bytes(), "a file of the tokenizer has changed",
                   where=f"{family}: {name}", remedy="name the change in the plan")  # fmt: skip


def keeps_the_dtype(subject: Subject) -> None:
    """In a bfloat16 base, tensors that are rewritten stay bfloat16, and new ones are."""
    import torch

    applied = _unless_refused(subject, dtype=torch.bfloat16)
    before = {name: spec.dtype for name, spec in applied.report.plan.base.specs.items()}
    outline = applied.report.plan.steps[0].outline
    floats = {name: spec.dtype for name, spec in outline.specs.items() if spec.dtype in ("F32", "F16", "F64")}
    wrong = [name for name in floats if before.get(name, "BF16") == "BF16"]
    demand(not wrong, "tensors come out in another dtype than the base's", where="bfloat16", found=named(wrong),
           remedy="give an edit the spec of the tensor that it rewrites; the writer rounds once")  # fmt: skip


def takes_any_sharding(subject: Subject) -> None:
    """A base in one file gives the same tensors as one in many."""
    many, one = subject.applied(), subject.applied(shards=None)
    demand(same_bits(read_tensors(many.folder), read_tensors(one.folder)), "sharding decides on the tensors",
           where=subject.family, remedy="look tensors up by name, never by file or position")  # fmt: skip


def takes_tied_and_untied_heads(subject: Subject) -> None:
    """With a tied and with an untied head it writes what agrees with its config, or refuses with a remedy."""
    refused = []
    for tied in (True, False):
        try:
            applied = _unless_refused(subject, tie_word_embeddings=tied)
        except NotApplicable as reason:
            refused.append(reason)
            continue
        says = json.loads((applied.folder / CONFIG).read_text()).get("tie_word_embeddings", tied)
        stored = any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in read_tensors(applied.folder))
        demand(
            stored is not says, "the head and config.json disagree", where="tied head" if tied else "untied head",
            found=f"tie_word_embeddings is {says}, and a head is {'stored' if stored else 'not stored'}",
            remedy="change tie_word_embeddings together with the head's tensor",
        )  # fmt: skip
    if len(refused) == 2:
        raise refused[0]


def _unless_refused(subject: Subject, **options: Any) -> Applied:
    """The case of these options, applied.

    Raises:
        NotApplicable: it is refused, as it should be.
    """
    try:
        return subject.applied(**options)
    except RegraftError as error:
        raise unless_refused(error, ", ".join(f"{key} = {value}" for key, value in options.items())) from None


def names_no_place_of_this_machine(subject: Subject) -> None:
    """No text file of the output has a path of the machine that wrote it."""
    applied = subject.applied()
    places = {str(subject.folder), str(subject.folder.resolve()), str(Path.home()), str(Path.cwd())}
    places = {place for place in places if len(place) > len("/root")} | {f"{tempfile.gettempdir()}/"}
    for path in _texts(applied.folder):
        text = path.read_text(errors="replace")
        found = [place for place in places if place in text]
        demand(
            not found,
            "a path of this machine is in the output",
            where=path.relative_to(applied.folder),
            found=named(found),
            remedy="say the name of a file, never its path, in notes, metrics and files",
        )


def _texts(folder: Path) -> Iterator[Path]:
    yield from (path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".md", ".jsonl", ".txt", ".py"))


def is_recorded(subject: Subject) -> None:
    """The lock file names the transformation, its version, its parameters, and the digest of every file it reads."""
    applied = subject.applied()
    lock = json.loads((applied.folder / LOCK).read_text())
    (step,), (asked,) = lock["steps"], lock["recipe"]["steps"]
    demand((step["use"], step["version"]) == (subject.kind.name, subject.kind.version), "the lock file names another",
           where=LOCK, found=step["use"], remedy="give `name` and `version` on the class")  # fmt: skip
    lost = set(applied.case.params) - set(asked)
    demand(not lost, "parameters are not in the lock file", where=LOCK, found=named(lost),
           remedy="do not exclude fields from serialisation")  # fmt: skip
    recorded = data_digests(subject.validated(applied.case))
    for key, value in _files(applied.case):
        known = any(name == key or name.startswith((f"{key}.", f"{key}[")) for name in recorded)
        demand(known, "a file that it reads has no digest in the lock file", where=key, found=Path(value).name,
               remedy="give the parameter the type Path (or regraft's Data), not str")  # fmt: skip


def _files(case: Case) -> Iterator[tuple[str, str]]:
    """Parameters whose values are paths of files or folders."""
    for key, value in case.params.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (str, Path)) and Path(item).is_absolute() and Path(item).exists():
                yield key, str(item)


def metrics_are_plain(subject: Subject) -> None:
    """Metrics are JSON under short names, and notes are lines of text."""
    (patch,) = subject.applied().report.patches
    _check_names(patch.metrics)
    wrong = [note for note in patch.notes if not isinstance(note, str) or "\n" in note or not note.strip()]
    demand(not wrong, "a note is not one line of text", found=named(map(repr, wrong)),
           remedy="give a tuple of sentences, a line each")  # fmt: skip


def _check_names(metrics: Mapping[str, Any]) -> None:
    wrong = [name for name in metrics if not isinstance(name, str) or not 0 < len(name) <= 80 or "\n" in name]
    demand(not wrong, "a metric has no short name", found=named(map(repr, wrong)),
           remedy="name metrics by a word or two")  # fmt: skip
