"""`regraft check`: is a recipe right, and can its steps be applied to its base?"""

from __future__ import annotations

from typing import Annotated

import typer

from regraft.cli.console import print_json
from regraft.cli.options import Json, RecipeName, Set, validated


def check(
    recipe: RecipeName,
    overrides: Set = None,
    recipe_only: Annotated[bool, typer.Option("--recipe-only", help="Do not open the base.")] = False,
    as_json: Json = False,
) -> None:
    """Validate a recipe: keys, types, plugins, and every step against the base's headers."""
    parsed = validated(recipe, overrides)
    findings: list[str] = []
    if not recipe_only:
        from regraft.core.execute import ApplyOptions, prepare
        from regraft.core.host import host

        findings = [str(finding) for finding in prepare(parsed, host(), ApplyOptions())[1]]
    if as_json:
        print_json({"recipe": parsed.name, "steps": [step.id for step in parsed.steps], "findings": findings})
        return
    for finding in findings:
        print(f"note: {finding}")
    count = len(parsed.steps)
    steps = f"{count} {'step' if count == 1 else 'steps'}"
    print(f"{parsed.name}: {steps}, no errors" + (" (the base was not opened)" if recipe_only else ""))
