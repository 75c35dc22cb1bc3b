"""`regraft plan`: what a recipe would do, exact to the byte; writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import human_bytes, print_json
from regraft.cli.options import Json, RecipeName, Set, Threads, validated

if TYPE_CHECKING:
    from regraft.core.patch import Outline
    from regraft.core.per_process import PerProcess
    from regraft.core.plan import Plan
    from regraft.core.recipe.model import Recipe
    from regraft.core.verify import Finding


def plan(
    recipe: RecipeName,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Target folder; its disk is looked at.")] = None,
    overrides: Set = None,
    threads: Threads = 0,
    link: Annotated[bool, typer.Option("--link", help="Plan for hard links of untouched weight files.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Name every tensor that changes.")] = False,
    world_size: Annotated[
        int | None,
        typer.Option(
            min=1, max=10**6, help="Show what each of so many processes under torchrun needs, on whatever machines."
        ),
    ] = None,
    shape: Annotated[
        Path | None,
        typer.Option(help="A config.json: plan on a model of that shape in place of the base, without any weights."),
    ] = None,
    rate: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="GB that a process writes in a second, for the time.")
    ] = 1.0,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do: tensors, sizes, memory, disk. Refuses what apply would refuse."""
    from regraft.core.cache import kept_steps
    from regraft.core.execute import ApplyOptions, inputs_of, prepare
    from regraft.core.host import host
    from regraft.core.per_process import per_process
    from regraft.core.requirements import check_resources, disk_bytes
    from regraft.core.workspace import check_target

    parsed = validated(recipe, overrides)
    if shape is None:
        made, findings = prepare(parsed, host(), ApplyOptions(threads=threads, link=link))
    else:
        made, findings = _plan_of_shape(parsed, shape, threads), []
    target = output or parsed.output.path
    if target is not None and shape is None:
        check_target(target, force=True, inputs=tuple(inputs_of(made)))
        findings += _needs_force(target)
        if world_size is None:
            check_resources(made, target, link=link)
    document = as_document(made, disk_bytes(made, link=link))
    document["cached"] = kept_steps(made) if shape is None else []
    if world_size is not None:
        document["per_process"] = _shares(per_process(made, world_size, link=link, rate=rate * 1e9))
    if as_json:
        print_json({**document, "findings": [str(finding) for finding in findings]})
        return
    for finding in findings:
        print(f"note: {finding}")
    _print(made, document, tensors=tensors)


def _plan_of_shape(recipe: Recipe, shape: Path, threads: int) -> Plan:
    from regraft.core.host import host
    from regraft.core.plan import make_plan
    from regraft.core.requirements import worker_count
    from regraft.core.sources.shape import open_shape

    plugins = host()
    base = open_shape(shape, plugins.architectures())
    return make_plan(recipe, base, plugins, threads=worker_count(threads))


def _shares(needs: PerProcess) -> dict[str, Any]:
    """What each process needs, as a JSON object."""
    return {
        "world_size": needs.world,
        "memory_bytes": needs.memory_bytes,
        "writing_memory_bytes": needs.writing_bytes,
        "step_memory_bytes": needs.step_bytes,
        "written_bytes": list(needs.written_bytes),
        "bytes_per_second": needs.rate,
        "writing_seconds": round(needs.writing_seconds, 3),
    }


def _needs_force(target: Path) -> list[Finding]:
    if not (target.is_dir() and any(target.iterdir())):
        return []
    from regraft.core.verify import Finding

    message = "the target is not empty: apply needs --force, which replaces it whole"
    return [Finding(message, str(target), fatal=False)]


def as_document(made: Plan, disk: int) -> dict[str, Any]:
    """The plan as a JSON object."""
    return {
        "recipe": made.recipe.resolved(),
        "steps": [
            {
                "id": step.id,
                "use": step.transformation.name,
                "rewritten_or_added": len(step.outline.specs),
                "removed": sorted(step.outline.removals),
                "renamed": dict(step.outline.renames),
                "json": {name: dict(change) for name, change in step.outline.json.items()},
                "or_nothing": step.outline.or_nothing,
                "undecided": {name: sorted(keys) for name, keys in step.outline.undecided.items()},
                "files": dict(step.outline.files),
                "notes": list(step.outline.notes),
            }
            for step in made.steps
        ],
        "output_notes": list(made.notes),
        "changes": {kind: list(names) for kind, names in made.changes.items()},
        "weight_files": dict(made.layout.files),
        "files": {name: file.nbytes for name, file in made.result.files.items()},
        "left_behind": dict(made.left_behind),
        "weight_bytes": made.weight_bytes,
        "output_bytes": made.output_bytes,
        "exact": made.exact,
        "memory_bytes": made.memory_bytes,
        "disk_bytes": disk,
        "threads": made.threads,
    }


def _print(made: Plan, document: dict[str, Any], *, tensors: bool) -> None:
    print(f"{made.recipe.name}: {made.base.label}, {len(made.base.tensors)} tensors")
    for step in made.steps:
        cached = " (from the cache)" if step.id in document["cached"] else ""
        print(f"  {step.id}: {step.transformation.summary}{cached}")
        for name in dict.fromkeys([*step.outline.json, *step.outline.undecided]):
            print(f"    {name}: {', '.join(_keys(step.outline, name))}")
        for note in step.outline.notes:
            print(f"    {note}")
    for note in made.notes:
        print(f"  output: {note}")
    print("tensors: " + ", ".join(f"{len(names)} {kind}" for kind, names in made.changes.items()))
    if tensors:
        for kind in ("rewritten", "added", "dropped"):
            for name in made.changes[kind]:
                print(f"  {kind}: {made.result.specs.get(name, name)}")
    for name, reason in made.left_behind.items():
        print(f"left behind: {name}: {reason}")
    exactly = "exactly" if made.exact else "at most"
    files = (
        f"weight files {len(made.layout.files)}, other files {len(made.result.files)}; plus lock file and model card"
    )
    print(f"output: {exactly} {made.output_bytes} bytes ({human_bytes(made.output_bytes)}): {files}")
    disk = human_bytes(document["disk_bytes"])
    if "per_process" not in document:
        print(f"needs: {disk} of disk, at most {human_bytes(made.memory_bytes)} of memory")
        return
    print(f"needs: {disk} of disk, for all processes together")
    _print_shares(document["per_process"])


def human_seconds(seconds: float) -> str:
    """`36 s`; a decimal below ten."""
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def _print_shares(needs: dict[str, Any]) -> None:
    print(f"each of {needs['world_size']} processes: at most {human_bytes(needs['memory_bytes'])} of memory")
    for step, nbytes in needs["step_memory_bytes"].items():
        if nbytes:
            print(f"  {step}: {human_bytes(nbytes)}")
    print(f"  writing: {human_bytes(needs['writing_memory_bytes'])}")
    written, rate = human_bytes(max(needs["written_bytes"])), human_bytes(needs["bytes_per_second"])
    print(f"  writes at most {written}, about {human_seconds(needs['writing_seconds'])} at {rate} a second;")
    print("  what steps read, compute and train comes on top")


def _keys(outline: Outline, name: str) -> list[str]:
    """What a step changes in a JSON file."""
    open_ = outline.undecided.get(name, frozenset())
    known = [key for key in outline.json.get(name, {}) if key not in open_]
    return [*known, *(f"{key} (known after the run)" for key in sorted(open_))]
