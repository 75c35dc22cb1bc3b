"""`regraft plugins`: what is installed and what is broken; a new plugin; is a plugin what it should be?"""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import print_json, table
from regraft.cli.options import Json, pass_on_json

if TYPE_CHECKING:
    from regraft.core.testing.conformance.check import Outcome

app = typer.Typer(help="List, start and check plugins.", no_args_is_help=False, invoke_without_command=True)


@app.callback()
def plugins(context: typer.Context, as_json: Json = False) -> None:
    """List plugins and their transformations."""
    if context.invoked_subcommand is None:
        list_(as_json)
    elif as_json:
        pass_on_json(context)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List plugins and their transformations."""
    from regraft.core.host import host

    found = host()
    found.ask()
    transformations = found.transformations()
    owners = found.owners
    brings = {info.name: [name for name, owner in owners.items() if owner == info.name] for info in found.plugins}
    if as_json:
        print_json(
            {
                "plugins": [{**vars(info), "transformations": brings[info.name]} for info in found.plugins],
                "transformations": [
                    {
                        "name": name,
                        "summary": kind.summary,
                        "paper": kind.paper,
                        "loads_with": kind.loads_with,
                        "version": kind.version,
                    }
                    for name, kind in transformations.items()
                ],
            }
        )
        return
    rows = [("plugin", "package", "status", "transformations")]
    for info in found.plugins:
        status = info.status if not info.reason else f"{info.status}: {info.reason}"
        rows.append(
            (info.name, f"{info.distribution} {info.version}".strip(), status, ", ".join(brings[info.name]) or "-")
        )
    print(table(rows))


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the transformation, such as scale-layers.")],
    path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write; default regraft-NAME here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a new plugin package: a transformation that works, its tests, and all that surrounds them."""
    from regraft.core.host import host
    from regraft.core.plugin_kit.new import new_plugin

    folder, files = new_plugin(name, path, host())
    if as_json:
        print_json({"path": str(folder), "files": files})
        return
    for file in files:
        print(folder / file)
    print(f'wrote {folder}; next: cd {quote(str(folder))} && pip install -e ".[tests]" && pytest')


@app.command("check")
def check_(
    package: Annotated[
        str, typer.Argument(metavar="PACKAGE", help="An installed package or plugin, or the folder of one.")
    ],
    only: Annotated[
        list[str] | None, typer.Option(metavar="CHECK", help="Run this check; can be given several times.")
    ] = None,
    families: Annotated[
        list[str] | None,
        typer.Option("--family", metavar="FAMILY", help="Try on this model family; can be given several times."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance checks on every transformation of a package."""
    from regraft.core.plugin_kit.check import check_package

    shown = check_package(
        package, only=only or (), families=families or (), listen=lambda *told: None if as_json else _tell(*told)
    )
    failed = sum(outcome.status == "failed" for outcomes in shown.values() for outcome in outcomes)
    if as_json:
        print_json({"package": package, "failed": failed, "transformations": _document(shown)})
    else:
        _summarise(package, shown, failed)
    if failed:
        raise typer.Exit(1)


def _tell(transformation: str, outcome: Outcome) -> None:
    """A line for a check, and below it what does not hold."""
    print(f"{transformation}  {outcome.status:14}  {outcome.check}", flush=True)
    if outcome.message:
        for line in outcome.message.splitlines():
            print(f"    {line}", flush=True)


def _document(shown: dict[str, list[Outcome]]) -> dict[str, Any]:
    return {
        name: [{"check": outcome.check, "status": outcome.status, "message": outcome.message} for outcome in outcomes]
        for name, outcomes in shown.items()
    }


def _summarise(package: str, shown: dict[str, list[Outcome]], failed: int) -> None:
    if not shown:
        print(f"{package}: it brings no transformation, and other hooks have no conformance checks")
        return
    passed = sum(outcome.status == "passed" for outcomes in shown.values() for outcome in outcomes)
    skipped = sum(outcome.status == "not applicable" for outcomes in shown.values() for outcome in outcomes)
    what = f"{len(shown)} {'transformation' if len(shown) == 1 else 'transformations'}"
    print(f"{package}: {what}, {passed} checks passed, {failed} failed, {skipped} not applicable")
