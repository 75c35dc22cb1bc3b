"""`regraft cache`: the kept results of steps: list them, verify them, make room."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import human_bytes, print_json, table
from regraft.cli.options import Json, pass_on_json

if TYPE_CHECKING:
    from regraft.core.cache_folder import CacheFolder

app = typer.Typer(
    help="List, verify and remove the kept results of steps.", no_args_is_help=False, invoke_without_command=True
)

_AGE = re.compile(r"([0-9]{1,6}) *([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@app.callback()
def cache(context: typer.Context, as_json: Json = False) -> None:
    """List, verify and remove the kept results of steps."""
    if context.invoked_subcommand is None:
        list_(as_json)
    elif as_json:
        pass_on_json(context)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List what is kept, what was used last first."""
    from regraft.core.cache_folder import cache_folder

    folder = cache_folder()
    rows = [_row(folder, key) for key in folder.entries()]
    if as_json:
        print_json({"folder": str(folder.path), "limit_bytes": folder.limit, "bytes": folder.nbytes(), "entries": rows})
        return
    if rows:
        heading = ("key", "step", "use", "recipe", "base", "size", "took", "last used")
        print(table([heading, *map(_cells, rows)]))
    count = f"{len(rows)} {'result' if len(rows) == 1 else 'results'}"
    print(f"{count}, {human_bytes(folder.nbytes())} of at most {human_bytes(folder.limit)} in {folder.path}")


def _row(folder: CacheFolder, key: str) -> dict[str, Any]:
    from regraft.core.cache_entry import read_entry
    from regraft.core.cache_folder import tree_bytes
    from regraft.core.errors import RegraftError

    place = folder.entry(key)
    row = {"key": key, "bytes": tree_bytes(place), "unused_seconds": round(max(0.0, _unused(folder, key)), 1)}
    try:
        facts = read_entry(place).facts
    except RegraftError as error:
        return {**row, "damaged": error.found or error.message}
    shown = ("step", "use", "version", "plugin", "plugin_version", "recipe", "base", "device", "seconds")
    return {**row, **{name: facts.get(name) for name in shown}}


def _unused(folder: CacheFolder, key: str) -> float:
    try:
        return time.time() - folder.entry(key).stat().st_mtime
    except OSError:
        return 0.0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    size, used = human_bytes(row["bytes"]), f"{_span(row['unused_seconds'])} ago"
    if "damaged" in row:
        return (row["key"][:16], "damaged", "", "", "", size, "", used)
    names = [str(row[name]) for name in ("step", "use", "recipe", "base")]
    return (row["key"][:16], *names, size, _span(row["seconds"]), used)


def _span(seconds: float) -> str:
    for unit, size in reversed(_SECONDS.items()):
        if seconds >= 2 * size and unit != "w":
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


@app.command()
def prune(
    max_size: Annotated[
        str | None, typer.Option("--max-size", metavar="SIZE", help="Remove the longest unused until so much is left.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Remove what was unused for 30d, 12h, 2w.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Remove what has been unused for long, or until the rest fits; without options, what exceeds the limit."""
    from dataclasses import replace

    from regraft.core.cache_folder import cache_folder, parsed_size

    folder = cache_folder()
    limit = folder.limit if max_size is None else 0 if max_size.strip() == "0" else parsed_size(max_size, "--max-size")
    age = None if older_than is None else _age(older_than)
    before, size = len(folder.entries()), folder.nbytes()
    folder.sweep()
    for key in folder.older_than(age) if age is not None else []:
        folder.remove(key)
    if max_size is not None or age is None:
        replace(folder, limit=limit).make_room(0)
    _tell_removed(folder, before, size, as_json=as_json)


def _age(text: str) -> float:
    from regraft.core.errors import UsageError

    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise UsageError("not an age", where="--older-than", expected="a number and s, m, h, d or w, such as 30d",
                         found=repr(text), remedy="write it so")  # fmt: skip
    return int(match[1]) * _SECONDS[match[2]]


@app.command()
def clear(as_json: Json = False) -> None:
    """Remove every kept result."""
    from regraft.core.cache_folder import cache_folder

    folder = cache_folder()
    before, size = len(folder.entries()), folder.nbytes()
    folder.sweep()
    for key in folder.entries():
        folder.remove(key)
    folder.forget_weights()
    _tell_removed(folder, before, size, as_json=as_json)


def _tell_removed(folder: CacheFolder, before: int, size: int, *, as_json: bool) -> None:
    left, freed = len(folder.entries()), size - folder.nbytes()
    if as_json:
        print_json({"folder": str(folder.path), "removed": before - left, "left": left, "freed_bytes": freed})
    else:
        print(f"removed {before - left} of {before}: {human_bytes(freed)} freed in {folder.path}")


@app.command()
def path(as_json: Json = False) -> None:
    """Print the folder."""
    from regraft.core.cache_folder import cache_folder

    folder = cache_folder()
    if as_json:
        print_json({"folder": str(folder.path), "limit_bytes": folder.limit})
    else:
        print(folder.path)


@app.command()
def verify(
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is damaged.")] = False, as_json: Json = False
) -> None:
    """Compare every kept result with its digests; exit code 1 if one is damaged and stays."""
    from regraft.core.cache_folder import cache_folder
    from regraft.core.errors import VerificationError

    folder = cache_folder()
    keys = folder.entries()
    damaged = {key: why for key in keys if (why := _damage(folder, key))}
    removed = [key for key in damaged if remove and folder.remove(key)]
    if as_json:
        print_json({"folder": str(folder.path), "entries": len(keys), "damaged": damaged, "removed": removed})
    else:
        for key, why in damaged.items():
            print(f"{'removed' if key in removed else 'damaged'}: {key[:16]}: {why}")
        print(f"{len(keys) - len(damaged)} of {len(keys)} sound in {folder.path}")
    if len(removed) < len(damaged):
        raise VerificationError(
            "the cache holds damaged entries", where=folder.path, found=len(damaged) - len(removed),
            remedy="remove them: regraft cache verify --remove; apply does so where it needs one",
        )  # fmt: skip


def _damage(folder: CacheFolder, key: str) -> str:
    from regraft.core.cache_entry import check_entry, read_entry
    from regraft.core.errors import RegraftError

    try:
        check_entry(read_entry(folder.entry(key)))
    except RegraftError as error:
        return error.found or error.message
    return ""
