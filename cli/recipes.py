"""`regraft recipes`: list, show and copy the recipes that ship with regraft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regraft.cli.console import print_json, table
from regraft.cli.options import Json, pass_on_json

app = typer.Typer(help="List, show and copy the shipped recipes.", no_args_is_help=False, invoke_without_command=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")]


@app.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        list_(as_json)
    elif as_json:
        pass_on_json(context)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the shipped recipes."""
    from regraft.core.recipe.shipped import shipped_names, shipped_text

    found = [{"name": name, "summary": _summary(shipped_text(name))} for name in shipped_names()]
    if as_json:
        print_json({"recipes": found})
    else:
        print(table([("recipe", "what it does"), *((item["name"], item["summary"]) for item in found)]))


@app.command()
def show(name: Name, as_json: Json = False) -> None:
    """Print a shipped recipe."""
    from regraft.core.recipe.shipped import shipped_text

    text = shipped_text(name)
    if as_json:
        print_json({"name": name, "text": text})
    else:
        print(text, end="")


@app.command()
def copy(
    name: Name,
    target: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="Where to; default NAME.toml here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Copy a shipped recipe, to be changed, and the data that it reads."""
    from regraft.cli.options import validated
    from regraft.core.recipe.copying import copy_recipe
    from regraft.core.recipe.shipped import shipped_path

    recipe = validated(str(shipped_path(name)), None)
    path, *data = copy_recipe(recipe, target or Path(f"{name}.toml"), force=force)
    if as_json:
        print_json({"path": str(path), "data": [str(file) for file in data]})
    else:
        print("\n".join(str(file) for file in (path, *data)))


def _summary(text: str) -> str:
    """The first comment line of a recipe."""
    return next((line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")), "")
