"""`regraft plan`: what a recipe would do, exact to the byte; writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import human_bytes, print_json
from regraft.cli.options import Json, RecipeName, Set, Threads, validated

if TYPE_CHECKING:
    from regraft.core.patch import Outline
    from regraft.core.plan import Plan
    from regraft.core.verify import Finding


def plan(
    recipe: RecipeName,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Target folder; its disk is looked at.")] = None,
    overrides: Set = None,
    threads: Threads = 0,
    link: Annotated[bool, typer.Option("--link", help="Plan for hard links of untouched weight files.")] = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="Name every tensor that changes.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do: tensors, sizes, memory, disk. Refuses what apply would refuse."""
    from regraft.core.cache import kept_steps
    from regraft.core.cache_folder import cache_folder
    from regraft.core.execute import ApplyOptions, inputs_of, prepare
    from regraft.core.host import host
    from regraft.core.requirements import check_resources, disk_bytes
    from regraft.core.workspace import check_target

    parsed = validated(recipe, overrides)
    made, findings = prepare(parsed, host(), ApplyOptions(threads=threads, link=link))
    target = output or parsed.output.path
    if target is not None:
        check_target(target, force=True, inputs=tuple(inputs_of(made)))
        findings += _needs_force(target)
        check_resources(made, target, link=link)
    document = as_document(made, disk_bytes(made, link=link))
    document["cached"] = kept_steps(made, cache_folder())
    if as_json:
        print_json({**document, "findings": [str(finding) for finding in findings]})
        return
    for finding in findings:
        print(f"note: {finding}")
    _print(made, document, tensors=tensors)


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
    print(f"needs: {human_bytes(document['disk_bytes'])} of disk, at most {human_bytes(made.memory_bytes)} of memory")


def _keys(outline: Outline, name: str) -> list[str]:
    """What a step changes in a JSON file."""
    open_ = outline.undecided.get(name, frozenset())
    known = [key for key in outline.json.get(name, {}) if key not in open_]
    return [*known, *(f"{key} (known after the run)" for key in sorted(open_))]
