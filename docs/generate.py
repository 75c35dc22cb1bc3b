"""Writes docs/reference from the code; with --check, fails if the committed pages are not what the code says."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import manpage
import typer

from regraft.cli.main import app
from regraft.core import errors, hookspecs
from regraft.core.host import host
from regraft.core.recipe.schema import recipe_schema

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- written by docs/generate.py: change the code, then run `nox -s docs -- write` -->\n"


def commands() -> Iterator[str]:
    """Every command with its arguments and options, from the typer application."""
    yield "# Commands\n"
    yield "`regraft COMMAND --help` says the same. Exit codes are on the page [Errors](errors.md).\n"
    yield from _command("regraft", typer.main.get_command(app))


def _command(path: str, command: Any) -> Iterator[str]:
    yield f"## {path}\n\n{inspect.cleandoc(command.help or '')}\n"
    rows = [row for parameter in command.params if (row := _parameter(parameter))]
    if rows:
        yield "| argument | default | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    for name, below in getattr(command, "commands", {}).items():
        yield from _command(f"{path} {name}", below)


def _parameter(parameter: Any) -> str | None:
    if getattr(parameter, "hidden", False):
        return None
    option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if option else [parameter.metavar or parameter.name.upper()]
    preset = names[0] if parameter.default is True else parameter.default
    default = f"`{preset}`" if option and preset not in (None, False, (), 0) else ""
    return f"| {', '.join(f'`{name}`' for name in names)} | {default} | {parameter.help or ''} |"


def recipe() -> Iterator[str]:
    """The keys of a recipe outside the steps, from the JSON Schema."""
    schema = recipe_schema(host().transformations())
    yield "# Recipe\n"
    yield "What `regraft schema` prints as JSON Schema, for people."
    yield "The steps' own keys: [Transformations](transformations.md).\n"
    yield _keys("The recipe", schema, schema)
    for name in ("base", "output"):
        yield _keys(f"[{name}]", _followed(schema["properties"][name], schema), schema)


def transformations() -> Iterator[str]:
    """Every first-party transformation with its parameters."""
    yield "# Transformations\n"
    for name, kind in sorted(host().transformations().items()):
        schema = kind.Params.model_json_schema()
        yield f"## {name}\n\n{kind.summary}\n"
        yield f"Paper: {kind.paper or 'none'}. Result loads with: {kind.loads_with}.\n"
        yield _keys("", schema, schema)


def _keys(title: str, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    required = set(schema.get("required", ()))
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, item in schema.get("properties", {}).items():
        node = {**_followed(item, root), **{name: item[name] for name in ("description", "default") if name in item}}
        preset = "" if node.get("default") in (None, "") else f"`{json.dumps(node['default'])}`"
        default = "required" if key in required else preset
        meaning = " ".join(str(node.get("description", "")).split())
        lines.append(f"| `{key}` | {_type(node, root)} | {default} | {meaning} |".replace(" | |", " | |"))
    heading = f"### {title}\n\n" if title else ""
    return heading + "\n".join(lines) + "\n"


def _followed(node: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        target: Any = root
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = target
    return node


def _type(node: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    node = _followed(node, root)
    if "enum" in node:
        return ", ".join(f"`{value}`" for value in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    for key in ("anyOf", "oneOf"):
        if key in node:
            return " or ".join(dict.fromkeys(_type(item, root) for item in node[key] if item.get("type") != "null"))
    return str(node.get("format") or node.get("type", "any"))


def hooks() -> Iterator[str]:
    """Every hook with its exact signature and docstring."""
    yield "# Hooks\n"
    yield f"{inspect.cleandoc(hookspecs.__doc__ or '')}\n\nThis is plugin API {hookspecs.API_VERSION}.\n"
    for name, function in vars(hookspecs).items():
        if name.startswith("regraft_"):
            signature = str(inspect.signature(function)).replace("'", "")
            yield f"## {name}\n\n```python\ndef {name}{signature}: ...\n```\n"
            yield f"{inspect.cleandoc(function.__doc__ or '')}\n"


def exceptions() -> Iterator[str]:
    """The exception tree and its exit codes."""
    yield "# Errors\n"
    yield "| exit code | meaning |\n|---|---|"
    yield "\n".join(f"| {code} | {meaning} |" for code, meaning in manpage.EXIT_CODES.items()) + "\n"
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.RegraftError):
            summary = inspect.cleandoc(kind.__doc__ or "").splitlines()[0]
            yield f"- `{name}` ({kind.exit_code}): {summary}"


MANPAGE = "regraft.1"
PAGES = {
    "commands.md": commands,
    "recipe.md": recipe,
    "transformations.md": transformations,
    "hooks.md": hooks,
    "errors.md": exceptions,
    MANPAGE: manpage.page,
}


def main() -> None:
    """Write every page, or compare."""
    stale = []
    for name, page in PAGES.items():
        text = ("" if name == MANPAGE else NOTE) + "\n".join(page()).rstrip() + "\n"
        path = REFERENCE / name
        if "--check" in sys.argv:
            stale += [name] * (not path.exists() or path.read_text() != text)
        else:
            path.write_text(text)
    if stale:
        raise SystemExit(f"stale: {', '.join(stale)}; run `nox -s docs -- write` and commit the result")


if __name__ == "__main__":
    main()
