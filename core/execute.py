"""Running a recipe: plan, steps, one streaming write, verification, and the rename that makes the target appear."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from regraft.core.cache import StepCache
from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.devices import check_device, resolve_device
from regraft.core.errors import InputError, PluginError, TransformationError, UsageError
from regraft.core.file_patterns import matched
from regraft.core.host import Host
from regraft.core.interrupts import unbroken
from regraft.core.jsonio import dump
from regraft.core.layout import Layout
from regraft.core.output_file import resources
from regraft.core.patch import Patch, overlay
from regraft.core.plan import (
    Plan,
    PlannedStep,
    blaming,
    layout_of,
    make_plan,
    open_base,
    output_of,
    outputs_of,
    paths_of,
)
from regraft.core.processes import DONE, READY, Processes, processes
from regraft.core.realised import Realised
from regraft.core.requirements import check_resources, worker_count
from regraft.core.saved_patches import check_patch_folders, save_patches
from regraft.core.sources.folder import CARD, INDEX, LOCK, REPORTS
from regraft.core.together import write_together
from regraft.core.transformation import Run
from regraft.core.verify import Finding, check_structure, raise_findings
from regraft.core.verify.output import all_code_is_ours, verify_output
from regraft.core.workspace import Workspace, check_target, work_folder, workspace
from regraft.core.writer import WriteOptions, WriteReport

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
        restart: forget what steps of an earlier run into the same target have saved to go on from.
        cache: take results of steps from the step cache, and keep them there.
    """

    device: str = "auto"
    threads: int = 0
    force: bool = False
    link: bool = False
    durable: bool = True
    strict: bool = False
    verify: str | None = None
    save_patches: Path | None = None
    restart: bool = False
    cache: bool = True


@dataclass
class Events:
    """What a front end can listen to: `say(line)`, `start(total_bytes)`, `advance(bytes)`."""

    say: Callable[[str], None] = lambda line: None
    start: Callable[[int], None] = lambda total: None
    advance: Callable[[int], None] = lambda nbytes: None


@dataclass(frozen=True)
class ApplyReport:
    """The result of a run. `brings_code` says that the output has a model class of its own; `cached` are the ids of the
    steps whose results came from the cache.
    """

    target: Path
    plan: Plan
    patches: tuple[Patch, ...]
    written: WriteReport
    output_bytes: int
    seconds: float
    verified: str
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())
    realised: Realised = field(default_factory=Realised)
    brings_code: bool = False
    cached: tuple[str, ...] = ()


def prepare(
    recipe: Recipe, host: Host, options: ApplyOptions, base: Checkpoint | None = None
) -> tuple[Plan, list[Finding]]:
    """Look at the base of `recipe`, unless it is open already as `base`, and plan; writes nothing.

    Raises:
        InputError: the base contradicts itself.
        RegraftError: as `make_plan`.
    """
    base = base or open_base(recipe, host)
    findings = [Finding(note, base.label, fatal=False) for note in base.notes]
    findings += check_structure(base, host.architectures())
    raise_findings(findings, InputError)
    plan = make_plan(recipe, base, host, threads=worker_count(options.threads))
    if plan.recipe.writes_adapter and options.verify not in (None, "structure"):
        raise UsageError("an adapter is verified by its structure alone", where="--verify", found=options.verify,
                         remedy="load it with peft, which regraft does not need")  # fmt: skip
    return plan, findings


def apply(
    recipe: Recipe,
    target: Path,
    host: Host,
    options: ApplyOptions,
    events: Events | None = None,
    *,
    base: Checkpoint | None = None,
) -> ApplyReport:
    """Run `recipe` and write its output to `target`; under torchrun, as the first process. `base` is its base where
    that is open already.

    Raises:
        RegraftError: whatever went wrong; the target is untouched.
        Ended: another process has failed.
    """
    ours = processes()
    events = events or Events()
    started = time.monotonic()
    check_device(options.device)
    plan, findings = prepare(recipe, host, options, base)
    check_target(target, force=options.force, inputs=tuple(inputs_of(plan)))
    _check_logs(plan, target)
    if options.save_patches is not None:
        check_patch_folders(plan, options.save_patches, [target, *inputs_of(plan)])
    check_resources(plan, target, link=options.link, world=ours.world, here=_on_this_machine(plan, options, ours))
    device = _device(plan, options, ours)
    with (
        workspace(target, force=options.force, restart=options.restart) as space,
        _saying_what_stays(space, events, ours),
    ):
        ours.announce(READY)
        ran = run_steps(plan, host, space, device, options, events)
        layout, written = _write(plan, ran, space, device, options, events)
        with resources(space.output):
            ran.realised.check(plan.recipe.output.minimum_cosine)
            _write_records(plan, ran, layout, written, space.output, device)
        verified = verify_output(plan, ran.patches, ran.result, space.output, options.verify, host)
        size = sum(path.stat().st_size for path in space.output.rglob("*") if path.is_file())
        if options.save_patches is not None:
            save_patches(plan, ran.patches, ran.checkpoints, options.save_patches, events.say)
        space.commit(durable=options.durable)
    ours.announce(DONE)
    ours.part()
    seconds = time.monotonic() - started
    notes = (*ran.notes, *filter(None, [ran.realised.note()]))
    code = "auto_map" in ran.result.config
    return ApplyReport(
        target, plan, ran.patches, written, size, seconds, verified, tuple(findings), notes, ran.realised, code,
        ran.cached,
    )  # fmt: skip


def attend(recipe: Recipe, target: Path, host: Host, options: ApplyOptions) -> None:
    """What every process but the first does under torchrun: the same steps, so that all compute together, and its share
    of the weight files.

    Raises:
        RegraftError: whatever went wrong.
        Ended: another process has failed.
    """
    ours = processes()
    check_device(options.device)
    plan, _ = prepare(recipe, host, options)
    device = _device(plan, options, ours)
    ours.wait(READY)
    space, events = work_folder(target), Events()
    ran = run_steps(plan, host, space, device, options, events)
    _write_weights(plan, ran, space, device, options, events)
    ours.wait(DONE)
    ours.part()


def _on_this_machine(plan: Plan, options: ApplyOptions, ours: Processes) -> int:
    """Processes that need this machine's memory: on CUDA what a step needs is the device's, each has its own."""
    return ours.local_world if ours.local_world > 1 and _device(plan, options, ours) == "cpu" else 1


def _device(plan: Plan, options: ApplyOptions, ours: Processes) -> str:
    return resolve_device(options.device, ours.local_rank if ours.world > 1 else None) if plan.computes else "cpu"


@contextmanager
def _saying_what_stays(space: Workspace, events: Events, ours: Processes) -> Iterator[None]:
    """Tell of the state that steps leave behind when the run does not reach its end; the others, that it does not."""
    try:
        yield
    except BaseException as error:
        with unbroken():
            ours.failing(error)
            if space.keeps_state:
                events.say("the state of the training is kept: the same command goes on from it, --restart begins anew")
        raise


def inputs_of(plan: Plan) -> Iterator[Path]:
    """Folders and files that the run reads: the base, the recipe and what it extends, whatever its steps name."""
    from regraft.core.sources.open import Reference

    paths = [Reference(plan.recipe.base.model).path, *plan.recipe.sources]
    for step in plan.steps:
        for _, path in paths_of(step.params):
            paths += [path, *matched(path).values()]
    yield from (path for path in paths if path.exists())


def _check_logs(plan: Plan, target: Path) -> None:
    """Refuse what a step would write into the target: it would stand in the way when the target is put in place."""
    for step in plan.steps:
        for key, path in outputs_of(step.params):
            if path.resolve().is_relative_to(target.resolve()):
                raise UsageError(
                    "stands inside the output, which appears only when everything is done",
                    where=f"step {step.id}: {key}",
                    expected="a path beside the output",
                    found=path,
                    remedy="write it elsewhere; losses and plots are in the output anyway",
                )


@dataclass(frozen=True)
class StepsRun:
    """What the steps gave.

    Args:
        patches: each step's.
        checkpoints: what each step saw, and last what all of them made.
        result: the output, after what `[output]` asks for.
        notes: what `[output]` has to say.
        realised: told, while the output is written, what becomes of changes of quantised weights.
        cached: ids of the steps whose patches came from the cache.
    """

    patches: tuple[Patch, ...]
    checkpoints: tuple[Checkpoint, ...]
    result: Checkpoint
    notes: tuple[str, ...]
    realised: Realised
    cached: tuple[str, ...] = ()


def run_steps(plan: Plan, host: Host, space: Workspace, device: str, options: ApplyOptions, events: Events) -> StepsRun:
    """Apply every step, each to the overlay of those before it, and then what `[output]` adds.

    Raises:
        TransformationError: a step failed, or its patch is not what it promised.
        PluginError: a plugin raised something else than a RegraftError.
    """
    ours = processes()
    checkpoints, patches = [plan.base], list[Patch]()
    cache = StepCache(plan, device, space.target, events.say, ours, strict=options.strict, wanted=options.cache)
    for index, step in enumerate(plan.steps):
        checkpoint = checkpoints[-1]
        trust = plan.recipe.base.trust_remote_code or all_code_is_ours(plan.steps, patches, checkpoint)
        run = Run(step.id, device, plan.recipe.seed, options.strict, space.cache, events.say, trust=trust,
                  state=space.state_of(step.id), rank=ours.rank, world=ours.world)  # fmt: skip
        host.before_step(step.id, checkpoint)
        patch = found = cache.find(index, checkpoint)
        started = time.monotonic()
        if patch is None:
            patch = _apply_step(step, checkpoint, run)
        host.after_step(step.id, checkpoint, patch)
        patches.append(patch)
        checkpoints.append(overlay(checkpoint, patch, by=step.id))
        if found is None:
            cache.keep(index, patch, checkpoint, checkpoints[-1], time.monotonic() - started)
    output = output_of(plan.recipe, plan.base, checkpoints[-1], host)
    result = replace(output.checkpoint, files={**output.checkpoint.files, **_reports(plan.steps, patches)})
    return StepsRun(tuple(patches), tuple(checkpoints), result, output.notes, output.realised, tuple(cache.hits))


def _apply_step(step: PlannedStep, checkpoint: Checkpoint, run: Run) -> Patch:
    with blaming(step.id):
        patch = step.transformation.apply(checkpoint, step.params, run)
    if deviations := step.outline.deviations(patch):
        raise TransformationError(
            "the patch is not what the plan said",
            where=f"step {step.id}",
            found=f"differences in {', '.join(deviations)}",
            remedy="report it to the plugin's author",
        )
    _check_metrics(step, patch)
    return patch


def _reports(steps: Sequence[PlannedStep], patches: Sequence[Patch]) -> dict[str, FileRef]:
    """The reports of every step, by their places in the output."""
    files = {}
    for step, patch in zip(steps, patches, strict=True):
        for name, file in patch.reports.items():
            if PurePosixPath(name).name != name or name in ("", "..") or set(name) & {"\0", "\\"}:
                raise PluginError("a report has no plain file name", where=f"step {step.id}", found=ascii(name))
            files[f"{REPORTS}/{step.id}/{name}"] = file
    return files


def _check_metrics(step: PlannedStep, patch: Patch) -> None:
    try:
        json.dumps([dict(patch.metrics), list(patch.notes)], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PluginError(
            "the step's metrics or notes are not JSON",
            where=f"step {step.id}",
            found=error,
            remedy="give plain finite numbers; report it to the plugin's author",
        ) from None


def _write(
    plan: Plan, ran: StepsRun, space: Workspace, device: str, options: ApplyOptions, events: Events
) -> tuple[Layout, WriteReport]:
    layout, written = _write_weights(plan, ran, space, device, options, events)
    with resources(space.output):
        if layout.index is not None:
            (space.output / INDEX).write_bytes(layout.index)
        for name, file in ran.result.files.items():
            path = space.output / name
            path.parent.mkdir(parents=True, exist_ok=True)
            file.copy_to(path)
    return layout, written


def _write_weights(
    plan: Plan, ran: StepsRun, space: Workspace, device: str, options: ApplyOptions, events: Events
) -> tuple[Layout, WriteReport]:
    layout = layout_of(plan.recipe, ran.result)
    if plan.exact and layout.files != plan.layout.files:
        raise TransformationError(
            "the output is not what the plan said", expected=plan.layout.files, found=layout.files,
            remedy="report it, with the recipe",
        )  # fmt: skip
    choices = WriteOptions(
        device, plan.threads, options.link, plan.recipe.output.digest, options.durable, options.strict
    )
    return layout, write_together(layout, space.output, choices, ran.realised.gauges, events)


def _write_records(plan: Plan, ran: StepsRun, layout: Layout, written: WriteReport, output: Path, device: str) -> None:
    from regraft.core.provenance import lock_document, model_card

    (output / CARD).write_bytes(model_card(plan, ran.patches, ran.result, ran.realised))
    document = lock_document(plan, ran.patches, layout, written, output, device, ran.realised)
    (output / LOCK).write_bytes(dump(document))
