"""`regraft reproduce`: does a record, run again, give the same bytes?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import event, print_json, progress, tell
from regraft.cli.options import Json, Threads

if TYPE_CHECKING:
    from regraft.core.reproduce import ReproduceReport

_SHOWN = 20


def reproduce(
    lock: Annotated[Path, typer.Argument(metavar="LOCK", help="A regraft.lock.json, or the folder with it.")],
    base: Annotated[Path | None, typer.Option(metavar="PATH", help="Where the base is now.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="STEP.KEY=PATH", help="Where an input of a step is now, such as honest.data."),
    ] = None,
    inputs: Annotated[
        Path, typer.Option(metavar="DIR", help="Where relative paths of the record start.", show_default=False)
    ] = Path(),
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the new output there. Default: compare, and remove it.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: as recorded.")] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Run a lock file's recipe again and compare every tensor and file; exit code 0 if all bytes are the same."""
    from regraft.core.errors import VerificationError
    from regraft.core.execute import Events
    from regraft.core.host import host
    from regraft.core.recorded_inputs import Whereabouts
    from regraft.core.reproduce import reproduce as run

    whereabouts = Whereabouts(base, _by_key(data or []), inputs)
    with progress(as_json=as_json) as bar:
        events = Events(say=partial(_say, as_json=as_json), start=bar.start, advance=bar.advance)
        report = run(lock, host(), whereabouts, out=out, device=device, threads=threads, events=events)
    if as_json:
        print_json(as_document(report))
    else:
        _print(report)
    if report.differing:
        raise VerificationError(
            f"not reproduced: {_count(len(report.differing), 'difference')}", where=report.lock,
            found=_causes(report), remedy="look at the differences of the environment; --out keeps the new output",
        )  # fmt: skip


def _say(line: str, *, as_json: bool) -> None:
    if as_json:
        event("message", text=line)
    else:
        tell(line)


def _by_key(given: list[str]) -> dict[str, Path]:
    from regraft.core.errors import UsageError
    from regraft.core.file_patterns import at_home

    found = {}
    for text in given:
        key, sign, path = text.partition("=")
        if not (key and sign and path):
            raise UsageError("does not say which input is where", where=f"--data {text}", expected="STEP.KEY=PATH",
                             remedy="write, for instance, --data honest.data=truthfulqa.jsonl")  # fmt: skip
        found[key] = at_home(path)
    return found


def as_document(report: ReproduceReport) -> dict[str, Any]:
    """The report as a JSON object."""
    return {
        "lock": str(report.lock),
        "reproduced": not report.differing,
        "device": report.device,
        "tensors_that_agree": report.tensors,
        "files_that_agree": report.files,
        "findings": [vars(finding) for finding in report.findings],
        "environment": [vars(difference) for difference in report.environment],
        "output": None if report.output is None else str(report.output),
    }


def _print(report: ReproduceReport) -> None:
    for difference in report.environment:
        print(f"environment: {difference}")
    for finding in [finding for finding in report.findings if not finding.fatal]:
        print(f"note: {finding}")
    for finding in report.differing[:_SHOWN]:
        print(f"difference: {finding}")
    if (more := len(report.differing) - _SHOWN) > 0:
        print(f"difference: {more} more")
    agree = f"{_count(report.tensors, 'tensor')} and {_count(report.files, 'file')}"
    print(f"{report.lock}: {'not ' if report.differing else ''}reproduced: {agree} have the recorded bytes")
    if report.output is not None:
        print(f"the new output is in {report.output}")


def _causes(report: ReproduceReport) -> str:
    causes = [difference.name for difference in report.environment if difference.severity != "nothing"]
    return f"an environment with another {', '.join(causes)}" if causes else "the recorded environment"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
