"""Running a recipe: plan, steps, one streaming write, verification, and the rename that makes the target appear."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.checkpoint import Checkpoint
from regraft.core.devices import resolve_device
from regraft.core.errors import (
    InputError,
    PluginError,
    RegraftError,
    ResourceError,
    TransformationError,
    VerificationError,
)
from regraft.core.host import Host
from regraft.core.jsonio import dump
from regraft.core.layout import lay_out
from regraft.core.patch import Patch, overlay
from regraft.core.plan import Plan, PlannedStep, make_plan, output_patches
from regraft.core.sources.folder import CARD, INDEX, LOCK, open_folder
from regraft.core.sources.open import dequantised
from regraft.core.transformation import Run
from regraft.core.verify import Finding, check_structure, raise_findings
from regraft.core.workspace import Workspace, check_target, workspace
from regraft.core.writer import WriteOptions, Writer, WriteReport

if TYPE_CHECKING:
    from regraft.core.recipe.model import Recipe


@dataclass(frozen=True)
class ApplyOptions:
    """What the command line adds to a recipe.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: workers of the writer; 0 means one for each processor, at most 4.
        force: replace a non-empty target.
        link: hard-link untouched shards.
        durable: flush to the disk before the target appears.
        strict: refuse NaN and Inf in tensors that a step reads.
        verify: `structure`, `load` or `forward`; None takes the recipe's.
        save_patches: folder to which each step's patch is saved.
    """

    device: str = "auto"
    threads: int = 0
    force: bool = False
    link: bool = False
    durable: bool = True
    strict: bool = False
    verify: str | None = None
    save_patches: Path | None = None


@dataclass
class Events:
    """What a front end can listen to: `say(line)`, `start(total_bytes)`, `advance(bytes)`."""

    say: Callable[[str], None] = lambda line: None
    start: Callable[[int], None] = lambda total: None
    advance: Callable[[int], None] = lambda nbytes: None


@dataclass(frozen=True)
class ApplyReport:
    """The result of a run."""

    target: Path
    plan: Plan
    patches: tuple[Patch, ...]
    written: WriteReport
    output_bytes: int
    seconds: float
    verified: str
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())


def worker_count(threads: int) -> int:
    """The number of workers that `threads` asks for."""
    return threads if threads > 0 else min(4, len(os.sched_getaffinity(0)))


def prepare(recipe: Recipe, host: Host, options: ApplyOptions) -> tuple[Plan, list[Finding]]:
    """Plan `recipe` and look at its base; writes nothing.

    Raises:
        InputError: the base contradicts itself.
        RegraftError: as `make_plan`.
    """
    plan = make_plan(recipe, host, threads=worker_count(options.threads))
    findings = check_structure(plan.base, host.architectures())
    raise_findings(findings, InputError)
    return plan, findings


def apply(recipe: Recipe, target: Path, host: Host, options: ApplyOptions, events: Events | None = None) -> ApplyReport:
    """Run `recipe` and write its output to `target`.

    Raises:
        RegraftError: whatever went wrong; the target is untouched.
    """
    events = events or Events()
    started = time.monotonic()
    plan, findings = prepare(recipe, host, options)
    check_target(target, force=options.force, inputs=tuple(inputs_of(plan)))
    check_resources(plan, target, link=options.link)
    device = resolve_device(options.device) if plan.computes else "cpu"
    with workspace(target) as space:
        patches, result, notes = run_steps(plan, host, space, device, options, events)
        written = _write(plan, result, space, device, options, events)
        _write_records(plan, patches, written, result, space.output, device)
        verified = verify_output(plan, result, patches, space.output, options, host)
        size = sum(path.stat().st_size for path in space.output.rglob("*") if path.is_file())
        space.commit(durable=options.durable)
    seconds = time.monotonic() - started
    return ApplyReport(target, plan, tuple(patches), written, size, seconds, verified, tuple(findings), notes)


def inputs_of(plan: Plan) -> Iterator[Path]:
    """Folders and files that the run reads."""
    from regraft.core.sources.open import Reference

    base = Reference(plan.recipe.base.model).path
    if base.exists():
        yield base
    for step in plan.steps:
        values = (getattr(step.params, name) for name in type(step.params).model_fields)
        yield from (value for value in values if isinstance(value, Path) and value.exists())


def check_resources(plan: Plan, target: Path, *, link: bool) -> None:
    """Refuse before anything is written when disk or memory is short.

    Raises:
        ResourceError: with what is needed and what there is.
    """
    parent = next(folder for folder in target.resolve().parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free, disk_bytes(plan, link=link)
    if needed > free:
        raise ResourceError(
            "not enough disk space",
            where=target,
            expected=f"{needed} bytes free",
            found=f"{free} bytes",
            remedy="free some space, or choose another [output] path",
        )
    available = available_memory()
    if available is not None and plan.memory_bytes > available:
        raise ResourceError(
            "not enough memory",
            expected=f"{plan.memory_bytes} bytes",
            found=f"{available} bytes available",
            remedy="use fewer --threads, or a machine with more memory",
        )


def disk_bytes(plan: Plan, *, link: bool) -> int:
    """Bytes of disk that the run needs at its peak: the whole output, less the shards that are linked."""
    linked = sum(shard.nbytes for shard in plan.layout.shards if link and shard.source is not None)
    return plan.output_bytes - linked + (1 << 20)


def available_memory() -> int | None:
    """Bytes of memory that the system can still give out; None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def run_steps(
    plan: Plan, host: Host, space: Workspace, device: str, options: ApplyOptions, events: Events
) -> tuple[list[Patch], Checkpoint, tuple[str, ...]]:
    """Apply every step, each to the overlay of those before it, and what `[output]` adds, with the notes of the latter.

    Raises:
        TransformationError: a step failed, or its patch is not what it promised.
        PluginError: a plugin raised something else than a RegraftError.
    """
    checkpoint, patches = plan.base, []
    for step in plan.steps:
        run = Run(step.id, device, plan.recipe.seed, options.strict, space.cache, events.say)
        host.before_step(step.id, checkpoint)
        patch = _apply_step(step, checkpoint, run)
        host.after_step(step.id, checkpoint, patch)
        above = overlay(checkpoint, patch, by=step.id)
        if options.save_patches is not None:
            from regraft.core.patch_folder import save_patch

            save_patch(patch, checkpoint, above, options.save_patches / f"{step.id}.regraft")
        patches.append(patch)
        checkpoint = above
    notes: list[str] = []
    for name, patch in output_patches(plan.recipe, checkpoint, host):
        notes += patch.notes
        checkpoint = overlay(checkpoint, patch, by=name)
    return patches, checkpoint, tuple(notes)


def _apply_step(step: PlannedStep, checkpoint: Checkpoint, run: Run) -> Patch:
    try:
        patch = step.transformation.apply(checkpoint, step.params, run)
    except RegraftError:
        raise
    except Exception as error:
        raise PluginError(
            f"the transformation failed: {type(error).__name__}: {error}",
            where=f"step {step.id}",
            remedy="run again with --traceback and report it to the plugin's author",
        ) from error
    if deviations := step.outline.deviations(patch):
        raise TransformationError(
            "the patch is not what the plan said",
            where=f"step {step.id}",
            found=f"differences in {', '.join(deviations)}",
            remedy="report it to the plugin's author",
        )
    return patch


def _write(
    plan: Plan, result: Checkpoint, space: Workspace, device: str, options: ApplyOptions, events: Events
) -> WriteReport:
    layout = lay_out(result, plan.recipe.output.shard_size)
    if plan.exact and layout.files != plan.layout.files:
        raise TransformationError(
            "the output is not what the plan said", expected=plan.layout.files, found=layout.files
        )
    events.start(sum(tensor.spec.nbytes for tensor in result.tensors.values()))
    choices = WriteOptions(
        device, plan.threads, options.link, plan.recipe.output.digest, options.durable, options.strict
    )
    written = Writer(space.output, choices, events.advance).write(layout)
    if layout.index is not None:
        (space.output / INDEX).write_bytes(layout.index)
    for name, file in result.files.items():
        path = space.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read())
    return written


def _write_records(
    plan: Plan, patches: Sequence[Patch], written: WriteReport, result: Checkpoint, output: Path, device: str
) -> None:
    from regraft.core.provenance import lock_document, model_card

    (output / CARD).write_bytes(model_card(plan, patches, result))
    (output / LOCK).write_bytes(dump(lock_document(plan, patches, written, output, device)))


def verify_output(
    plan: Plan, result: Checkpoint, patches: Sequence[Patch], output: Path, options: ApplyOptions, host: Host
) -> str:
    """Verify the written folder as deep as asked; returns the depth.

    Raises:
        VerificationError: it is not what it should be.
    """
    try:
        written = open_folder(output, label=output.name)
    except InputError as error:
        raise VerificationError(f"the output cannot be read back: {error.message}", where=error.where) from None
    if written.specs != result.specs and dict(written.specs) != dict(result.specs):
        raise VerificationError("the written tensors are not those of the plan", where=output.name)
    stray = set(written.files) - set(result.files) - {CARD}
    if stray:
        raise VerificationError(
            "the output has files that nothing wrote", where=output.name, found=", ".join(sorted(stray))
        )
    raise_findings(check_structure(dequantised(written), host.architectures()), VerificationError)
    depth = options.verify or plan.recipe.output.verify
    if depth in ("load", "forward"):
        from regraft.core.verify.load import verify_load

        ours = any("auto_map" in patch.json.get("config.json", {}) for patch in patches)
        verify_load(output, depth, trust=ours or plan.recipe.base.trust_remote_code)  # type: ignore[arg-type]
    return depth
