"""`regraft diff`: how two checkpoints differ; exit code 1 if they do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regraft.cli.console import event, print_json, table, tell
from regraft.cli.options import Json, Model, Threads

if TYPE_CHECKING:
    from regraft.core.checkpoint import Checkpoint
    from regraft.core.diff import Difference, TensorChange


def diff(
    before: Model,
    after: Model,
    threads: Threads = 0,
    everything: Annotated[bool, typer.Option("--all", help="Also compare model cards; name every tensor.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page about it: sizes of changes by layer, keys.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare two checkpoints: tensors, config, tokenizer, files. Exit code 1 if they differ."""
    from regraft.core.diff import compare_checkpoints
    from regraft.core.host import host
    from regraft.core.requirements import worker_count
    from regraft.core.sources import open_checkpoint

    if html is not None:
        from regraft.core.report.page import check_page_path

        check_page_path(html, Path(before), Path(after))
    extra = host().sources()
    ignore = frozenset() if everything else frozenset({"README.md", "README.base.md"})
    sides = (open_checkpoint(before, extra=extra), open_checkpoint(after, extra=extra))
    found = compare_checkpoints(*sides, ignore=ignore, threads=worker_count(threads))
    if html is not None:
        _write_page(html, found, sides, as_json=as_json)
    if as_json:
        print_json({"equal": not found, **asdict(found)})
    else:
        _print(found, limit=None if everything else 20)
    raise typer.Exit(1 if found else 0)


def _write_page(path: Path, found: Difference, sides: tuple[Checkpoint, Checkpoint], *, as_json: bool) -> None:
    from regraft.core.host import host
    from regraft.core.report.differing import gather
    from regraft.core.report.page import differing_page, save_page

    save_page(differing_page(gather(found, *sides, host().architectures())), path)
    if as_json:
        event("wrote", path=str(path))
    else:
        tell(f"wrote {path}")


def _print(found: Difference, limit: int | None) -> None:
    if found.tensors:
        rows = [("tensor", "change", "before", "after", "max |d|", "|d|/|before|")]
        print(table(rows + [_row(change) for change in found.tensors[:limit]]))
        if limit is not None and len(found.tensors) > limit:
            print(f"... and {len(found.tensors) - limit} more (--all shows them)")
    for name, change in found.json.items():
        print(f"{name}: {json.dumps(change, ensure_ascii=False)}")
    for name, kind in found.files.items():
        print(f"{name}: {kind}")
    count = len(found.tensors)
    differ = "1 tensor differs" if count == 1 else f"{count} tensors differ"
    summary = f"{differ}, {found.equal_tensors} are equal"
    print(summary if found else f"no difference ({found.equal_tensors} tensors)")


def _row(change: TensorChange) -> tuple[str, ...]:
    numbers = ["-" if value is None else f"{value:.3g}" for value in (change.max_abs, change.relative)]
    return (change.name, change.kind, change.before or "-", change.after or "-", *numbers)
