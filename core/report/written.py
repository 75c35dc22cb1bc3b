"""The facts of the page about one output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.diff import compare_checkpoints
from regraft.core.errors import UsageError
from regraft.core.lock_file import Lock, LockedStep
from regraft.core.provenance import adapter_usage, usage
from regraft.core.report.base import Base, find_base
from regraft.core.report.changes import change_map, counted, from_lock, listed
from regraft.core.report.comparison import Changes, measured_changes
from regraft.core.report.documents import read_lock
from regraft.core.report.evaluations import EvaluationPart, evaluation_part
from regraft.core.report.figures import Figures, figures
from regraft.core.report.places import places_of
from regraft.core.report.step_reports import StepReport, step_report
from regraft.core.report.toml_text import toml_text
from regraft.core.sources.folder import CARD, open_folder
from regraft.core.sources.open import Source, dequantised
from regraft.core.verify.adapter import is_adapter, open_adapter
from regraft.core.verify.folder import VerifyReport, verify_folder

_NOT_COMPARED = frozenset({CARD, "README.base.md"})
_DEQUANTISED = "Quantised weights are compared as they are dequantised, and counted with the sizes of that."
_WHAT = "What became of each tensor, as the lock file tells"


@dataclass(frozen=True)
class StepPart:
    """A step: what the lock file says, what its plugin says of itself, what it left behind."""

    locked: LockedStep
    summary: str
    paper: str
    report: StepReport


@dataclass(frozen=True)
class Written:
    """Everything about one output, as the template wants it.

    Args:
        name: of the recipe.
        folder: name of the output folder.
        adapter: whether it is an adapter beside an untouched base.
        lock: the lock file.
        parameters, nbytes: of all tensors.
        dtypes: number of tensors by dtype.
        weights: weight files with their sizes.
        verified: what `regraft verify` says.
        base: what was compared with.
        changes: what has changed.
        steps: the steps.
        evaluations: results given.
        recipe: as TOML.
        quantised: figures of a quantised output.
        usage: lines of Python that load it.
    """

    name: str
    folder: str
    adapter: bool
    lock: Lock
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    weights: Sequence[tuple[str, int]]
    verified: VerifyReport
    base: Base
    changes: Changes
    steps: Sequence[StepPart]
    evaluations: Sequence[EvaluationPart]
    recipe: str
    quantised: Figures
    usage: str


def gather(
    folder: Path,
    *,
    base: str | None = None,
    evaluations: Sequence[Path] = (),
    transformations: Mapping[str, Any] | None = None,
    families: Sequence[Any] = (),
    sources: Sequence[Source] = (),
    threads: int = 2,
) -> Written:
    """Gather the facts of an output; reads its weights, and those of the base that were rewritten.

    Args:
        folder: that `regraft apply` wrote.
        base: a checkpoint to compare with; without, the lock file's is looked for.
        evaluations: results of `regraft eval --json`.
        transformations: classes by name, for their summaries.
        families: rows of plugins for `architecture_of`.
        sources: of plugins.
        threads: tensors compared at a time.

    Raises:
        InputError: there is no lock file, or something cannot be read.
        UsageError: a base is given for an adapter.
    """
    lock = read_lock(folder)
    parts = [evaluation_part(path) for path in evaluations]
    label, adapter = folder.resolve().name, is_adapter(folder)
    verified = verify_folder(folder, families)
    output = open_adapter(folder, label=label) if adapter else dequantised(open_folder(folder, label=label))
    against = _beside(folder, base) if adapter else find_base(lock, folder, base, sources)
    stored = lock.output.tensors
    kinds = transformations or {}
    if against.checkpoint is not None and (output.packed is not None or against.checkpoint.packed is not None):
        against = replace(against, note=f"{against.note} {_DEQUANTISED}".strip())
    return Written(
        str(lock.recipe.get("name") or label), label, adapter, lock,
        sum(spec.numel for spec in output.specs.values()),
        sum(tensor.nbytes(name) for name, tensor in stored.items()),
        _counted(tensor.dtype for tensor in stored.values()),
        [(name, (folder / name).stat().st_size) for name in sorted(set(output.shards.values()))],
        verified, against, _changes(lock, output, against, families, threads, sound=not verified.faults),
        [_step(folder, step, kinds.get(step.use)) for step in lock.steps],
        parts, toml_text(lock.recipe), figures(lock.output.quantised), _usage(lock, output, adapter=adapter),
    )  # fmt: skip


def _beside(folder: Path, given: str | None) -> Base:
    if given is not None:
        raise UsageError("an adapter stands beside its base, so there is nothing to compare", where="--base",
                         expected=f"nothing, because {folder.name} is an adapter", found=given,
                         remedy="leave --base out")  # fmt: skip
    return Base(None, same=False, note="This is an adapter: the base beside it is untouched.")


def _changes(
    lock: Lock, output: Checkpoint, base: Base, families: Sequence[Any], threads: int, *, sound: bool
) -> Changes:
    """What has changed; `sound`: the digests of the lock file have been recomputed, and agree."""
    if base.checkpoint is not None:
        found = compare_checkpoints(
            base.checkpoint,
            output,
            ignore=_NOT_COMPARED,
            threads=threads,
            known_equal=_copied(lock, output, base) if sound else frozenset(),
        )
        return measured_changes(found, base.checkpoint, output, families)
    changes = from_lock(lock)
    sizes = {name: tensor.nbytes(name) for name, tensor in lock.output.tensors.items()}
    places = places_of(output.config, list(lock.output.tensors), families)
    rows, more = listed(changes)
    return Changes(False, counted(changes, sizes), change_map(changes, places, title=_WHAT), rows, more)


def _copied(lock: Lock, output: Checkpoint, base: Base) -> frozenset[str]:
    """Tensors whose digest is that of the base; dequantised weights have none of their own."""
    assert base.checkpoint is not None
    if not base.same or base.checkpoint.packed is not None or output.packed is not None:
        return frozenset()
    stored = lock.output.tensors.items()
    return frozenset(
        name for name, tensor in stored if tensor.digest is not None and tensor.digest == lock.base.tensors.get(name)
    )


def _step(folder: Path, step: LockedStep, kind: Any) -> StepPart:
    summary, paper = (str(getattr(kind, name, "") or "") for name in ("summary", "paper"))
    return StepPart(step, summary, paper, step_report(folder, step.id, step.metrics))


def _usage(lock: Lock, output: Checkpoint, *, adapter: bool) -> str:
    lines = adapter_usage(lock.base.model_extra or {}) if adapter else usage("auto_map" in output.config)
    return "\n".join(lines)


def _counted(dtypes: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(dtypes).items()))
