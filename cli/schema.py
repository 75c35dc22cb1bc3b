"""`regraft schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from regraft.cli.console import json_text


def schema(
    as_json: Annotated[bool, typer.Option("--json", help="Changes nothing: a schema is JSON.")] = False,
) -> None:
    """Print the JSON Schema of recipes, with the parameters of every installed plugin."""
    from regraft.core.host import host
    from regraft.core.recipe.schema import recipe_schema

    print(json_text(recipe_schema(host().transformations()), sys.stdout, indent=2))
