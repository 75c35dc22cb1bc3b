"""`regraft check`: are recipes right, and can their steps be applied to their bases?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regraft.cli.console import fail, print_json
from regraft.cli.options import Json, RecipeNames, Set, validated
from regraft.core.errors import RegraftError


def check(
    recipes: RecipeNames,
    overrides: Set = None,
    recipe_only: Annotated[bool, typer.Option("--recipe-only", help="Do not open the base.")] = False,
    as_json: Json = False,
) -> None:
    """Validate recipes: keys, types, plugins, and every step against the base's headers.

    Of several, each is looked at; the exit code is that of the first that fails.
    """
    if len(recipes) == 1:
        document = _checked(recipes[0], overrides, recipe_only=recipe_only)
        print_json(document) if as_json else _print(document, recipe_only=recipe_only)
        return
    codes, documents = list[int](), list[dict[str, Any]]()
    for name in recipes:
        try:
            document = _checked(name, overrides, recipe_only=recipe_only)
        except RegraftError as error:
            codes.append(fail(error, as_json=as_json))
            continue
        documents.append(document)
        if not as_json:
            _print(document, recipe_only=recipe_only)
    if as_json:
        print_json({"recipes": documents})
    if codes:
        raise typer.Exit(codes[0])


def _checked(name: str, overrides: list[str] | None, *, recipe_only: bool) -> dict[str, Any]:
    """What is known of a recipe without errors."""
    parsed = validated(name, overrides)
    findings: list[str] = []
    if not recipe_only:
        from regraft.core.execute import ApplyOptions, prepare
        from regraft.core.host import host

        findings = [str(finding) for finding in prepare(parsed, host(), ApplyOptions())[1]]
    return {"recipe": parsed.name, "steps": [step.id for step in parsed.steps], "findings": findings}


def _print(document: dict[str, Any], *, recipe_only: bool) -> None:
    for finding in document["findings"]:
        print(f"note: {finding}")
    count = len(document["steps"])
    steps = f"{count} {'step' if count == 1 else 'steps'}"
    print(f"{document['recipe']}: {steps}, no errors" + (" (the base was not opened)" if recipe_only else ""))
