"""Options that several commands share, and the way from a recipe's name to the validated recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from regraft.core.recipe.model import Recipe


def _shipped(incomplete: str) -> list[str]:
    """Shipped recipes that begin so, for the shell's completion; files are the shell's own affair."""
    from regraft.core.recipe.shipped import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped recipe.", autocompletion=_shipped),
]
RecipeNames = Annotated[
    list[str],
    typer.Argument(metavar="RECIPE...", help="Recipe files, or names of shipped recipes.", autocompletion=_shipped),
]
Model = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Folder, .safetensors or .gguf file, hub id, or demo:tiny.")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as output.dtype=bfloat16.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Threads = Annotated[
    int, typer.Option(min=0, help="Workers; 0 means one for each processor, at most 4. The bytes do not depend on it.")
]
DEPTHS = ("structure", "load", "forward")
"""How deeply a checkpoint can be verified."""

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option(help="auto, float32, bfloat16 or float16; auto is bfloat16 where stored so and fast, else float32."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own code run.")]


def pass_on_json(context: typer.Context) -> None:
    """Let `--json` before a subcommand, as in `regraft cache --json list`, hold for the subcommand."""
    context.default_map = {str(context.invoked_subcommand): {"as_json": True}}


def validated(name: str, overrides: list[str] | None) -> Recipe:
    """The recipe that `name` stands for, validated against the installed plugins.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    from regraft.core.host import host
    from regraft.core.recipe.load import load_recipe
    from regraft.core.recipe.shipped import find_recipe

    plugins = host()
    return load_recipe(find_recipe(name), overrides or [], plugins.transformations(), plugins.broken)


def target_of(recipe: Recipe, output: Path | None) -> Path:
    """Where the output goes: `--output`, or the recipe's `[output] path`; both are relative to the current folder.

    Raises:
        UsageError: neither is given.
    """
    from regraft.core.errors import UsageError

    if output is not None:
        return output
    if recipe.output.path is None:
        raise UsageError(
            "the recipe does not say where the output goes",
            where=recipe.path,
            expected="[output] path",
            remedy="add it to the recipe, or give --output",
        )
    return recipe.output.path
