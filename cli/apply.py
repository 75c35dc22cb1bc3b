"""`regraft apply`: run a recipe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import event, human_bytes, print_json, progress, tell
from regraft.cli.options import DEPTHS, Json, RecipeName, Set, Threads, target_of, validated
from regraft.cli.push import Branch, Licence, Private, check_before, push_output, upload_of

if TYPE_CHECKING:
    from regraft.core.execute import ApplyReport


def apply(
    recipe: RecipeName,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Target folder; overrides [output] path.")
    ] = None,
    overrides: Set = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Threads = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a target that is a checkpoint already, whole.")
    ] = False,
    link: Annotated[
        bool, typer.Option("--link", help="Hard-link untouched weight files instead of copying them.")
    ] = False,
    durable: Annotated[
        bool, typer.Option("--durable/--no-durable", help="Flush to the disk before the target appears.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse NaN and Inf in tensors that a step reads.")] = False,
    verify: Annotated[str | None, typer.Option(help="structure, load or forward; overrides [output] verify.")] = None,
    save_patches: Annotated[Path | None, typer.Option(help="Save each step's patch into this folder.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Train anew, whatever an unfinished run into this target has saved.")
    ] = False,
    cache: Annotated[
        bool, typer.Option("--cache/--no-cache", help="Take results of steps from the cache, and keep them there.")
    ] = True,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Push the output to the hub, once it stands and is verified.")
    ] = None,
    private: Private = False,
    revision: Branch = "main",
    licence: Licence = None,
    as_json: Json = False,
) -> None:
    """Run a recipe and write a new checkpoint."""
    from regraft.core.errors import UsageError
    from regraft.core.execute import ApplyOptions, Events, attend
    from regraft.core.execute import apply as run
    from regraft.core.host import host
    from regraft.core.processes import processes
    from regraft.core.recipe.wording import either

    if verify not in (None, *DEPTHS):
        raise UsageError(
            "unknown depth", where="--verify", expected=either(DEPTHS), remedy="name one of these", found=verify
        )
    parsed = validated(recipe, overrides)
    target = target_of(parsed, output)
    upload = upload_of(push_to_hub, private=private, revision=revision, licence=licence)
    options = ApplyOptions(device, threads, force, link, durable, strict, verify, save_patches, restart, cache)
    if not processes().first:
        attend(parsed, target, host(), options)
        return
    if upload is not None:
        check_before(upload, parsed)
    with progress(as_json=as_json) as bar:
        say = partial(_say, as_json=as_json)
        events = Events(say=say, start=bar.start, advance=bar.advance)
        report = run(parsed, target, host(), options, events)
    if not as_json:
        _print(report)
    pushed = None if upload is None else push_output(report.target, upload, as_json=as_json)
    if as_json:
        print_json({**as_document(report), "pushed": pushed})


def _say(line: str, *, as_json: bool) -> None:
    if as_json:
        event("message", text=line)
    else:
        tell(line)


def as_document(report: ApplyReport) -> dict[str, Any]:
    """The report as a JSON object."""
    written = report.written
    return {
        "target": str(report.target),
        "bytes": report.output_bytes,
        "copied_bytes": written.copied_bytes,
        "computed_bytes": written.computed_bytes,
        "linked_bytes": written.linked_bytes,
        "seconds": round(report.seconds, 3),
        "verified": report.verified,
        "cached": list(report.cached),
        "steps": [
            {"id": step.id, "use": step.transformation.name, "metrics": dict(patch.metrics), "notes": list(patch.notes)}
            for step, patch in zip(report.plan.steps, report.patches, strict=True)
        ],
        "changes": {kind: len(names) for kind, names in report.plan.changes.items()},
        "output_notes": list(report.notes),
        "left_behind": dict(report.plan.left_behind),
        "non_finite_inputs": {name: vars(count) for name, count in written.non_finite.items()},
        "findings": [str(finding) for finding in report.findings],
    }


def _print(report: ApplyReport) -> None:
    for finding in report.findings:
        tell(f"note: {finding}")
    for name, count in report.written.non_finite.items():
        tell(f"warning: {name}: {count} in the base, carried through the step that reads it (--strict refuses)")
    for name, reason in report.plan.left_behind.items():
        tell(f"left behind: {name}: {reason}")
    for step, patch in zip(report.plan.steps, report.patches, strict=True):
        print(f"{step.id}: {step.transformation.summary}")
        for note in patch.notes:
            print(f"  {note}")
    for note in report.notes:
        print(f"output: {note}")
    size, seconds = human_bytes(report.output_bytes), f"{report.seconds:.1f} s"
    print(f"wrote {report.target}: {size} in {seconds}, verified: {report.verified}")
    if report.plan.recipe.writes_adapter:
        print(f'use it: PeftModel.from_pretrained(model, "{report.target}")')
        return
    print(f'use it: AutoModelForCausalLM.from_pretrained("{report.target}"{_trust(report)})')


def _trust(report: ApplyReport) -> str:
    return ", trust_remote_code=True" if report.brings_code else ""
