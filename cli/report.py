"""`regraft report`: one HTML page about an output, that loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli.console import human_bytes, print_json
from regraft.cli.options import Json, Threads


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that `regraft apply` wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("report.html"),
    base: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="What to compare with; without, the lock file's base if it is at hand."
        ),
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--eval", metavar="FILE", help="A result of `regraft eval --json`. Give several."),
    ] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Write one HTML page about an output: recipe, changes by layer, losses, pictures, evaluation, provenance."""
    from regraft.core.host import host
    from regraft.core.report.page import check_page_path, save_page, written_page
    from regraft.core.report.written import gather
    from regraft.core.requirements import worker_count

    check_page_path(output, folder, *([] if base is None else [Path(base)]))
    plugins = host()
    facts = gather(
        folder,
        base=base,
        evaluations=evaluation or (),
        transformations=plugins.transformations(),
        families=plugins.architectures(),
        sources=plugins.sources(),
        threads=worker_count(threads),
    )
    if facts.base.place is not None:
        check_page_path(output, facts.base.place)
    page = written_page(facts)
    save_page(page, output)
    measured, faults = facts.changes.measured, len(facts.verified.faults)
    if as_json:
        counts = {words: count for words, count, _ in facts.changes.counts}
        print_json({"page": str(output), "bytes": len(page), "measured": measured, "faults": faults, "tensors": counts})
        return
    compared = "changes measured against the base" if measured else "no base at hand, changes told by the lock file"
    print(f"wrote {output}: {human_bytes(len(page))}, {compared}" + (f", {faults} faults found" if faults else ""))
