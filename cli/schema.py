"""`regraft schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema(
    as_json: Annotated[bool, typer.Option("--json", help="Changes nothing: a schema is JSON.")] = False,
) -> None:
    """Print the JSON Schema of recipes, with the parameters of every installed plugin."""
    from regraft.core.host import host
    from regraft.core.recipe.schema import recipe_schema

    print(json.dumps(recipe_schema(host().transformations()), indent=2, ensure_ascii=False))
