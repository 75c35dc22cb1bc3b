"""The JSON Schema of recipes, with the parameters of every installed plugin, for completion and checks in editors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from regraft.core.recipe.document import SCHEMA_VERSION
from regraft.core.recipe.model import Settings
from regraft.core.recipe.nodes import Node, shape_of
from regraft.core.recipe.steps import ID_PATTERN, Transformations

if TYPE_CHECKING:
    from regraft.core.transformation import AnyTransformation

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema(transformations: Transformations) -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) that every valid recipe satisfies.

    A step is one of the installed transformations, told apart by `use`. What a recipe may inherit is required only
    where `extends` is absent.

    Raises:
        PluginError: a plugin's parameters cannot be described.
    """
    definitions: Node = {}
    settings = _adopted(Settings, "recipe", definitions)
    base = settings["properties"]["base"]["$ref"].rpartition("/")[2]
    needed = definitions[base].pop("required")
    steps = [_step(name, transformations[name], definitions) for name in sorted(transformations)]
    return {
        "$schema": DIALECT,
        "title": "regraft recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "schema": {"const": SCHEMA_VERSION, "description": "Version of the recipe format."},
            "extends": {
                "type": "string", "minLength": 1,
                "description": "A recipe that this one changes, as a path from this file. Tables merge; steps replace.",
            },
            **settings["properties"],
            "steps": {
                "type": "array", "description": "What is done to the base, in order.",
                "items": {"type": "object", "required": ["use"], **({"oneOf": steps} if steps else {"not": {}})},
            },
        },
        "if": {"not": {"required": ["extends"]}},
        "then": {"required": ["base"], "properties": {"base": {"required": needed}}},
        "$defs": definitions,
    }  # fmt: skip


def _step(name: str, transformation: type[AnyTransformation], definitions: Node) -> Node:
    """A step that uses `name`: its parameters stand beside `use` and `id`."""
    schema = _adopted(transformation.Params, f"steps.{name}", definitions)
    schema["properties"] = {
        "use": {"const": name, "description": getattr(transformation, "summary", name)},
        "id": {"type": "string", "pattern": ID_PATTERN, "description": "Names the step; `use` by default."},
        **schema.get("properties", {}),
    }
    schema["required"] = ["use", *schema.get("required", [])]
    schema.pop("description", None)
    definitions[f"steps.{name}"] = {"title": name, **schema}
    return {"$ref": f"#/$defs/steps.{name}"}


def _adopted(model: type[BaseModel], prefix: str, definitions: Node) -> Node:
    """The schema of a model, its own definitions moved into `definitions` under names of their own."""
    schema: Node = _for_toml(shape_of(model).root, prefix)
    for name, definition in schema.pop("$defs", {}).items():
        definitions[f"{prefix}.{name}"] = definition
    return schema


def _for_toml(node: Any, prefix: str) -> Any:
    """A copy without `null`, which TOML cannot write, and with references to the moved definitions."""
    if isinstance(node, list):
        return [_for_toml(item, prefix) for item in node]
    if not isinstance(node, dict):
        return node
    copy = {key: _for_toml(item, prefix) for key, item in node.items() if not (key == "default" and item is None)}
    if isinstance(copy.get("$ref"), str):
        copy["$ref"] = f"#/$defs/{prefix}.{copy['$ref'].rpartition('/')[2]}"
    if "discriminator" in copy and "mapping" in copy["discriminator"]:
        copy.pop("discriminator")
    members = copy.get("anyOf")
    if isinstance(members, list) and {"type": "null"} in members:
        members.remove({"type": "null"})
        if len(members) == 1:
            copy = {**copy.pop("anyOf")[0], **copy}
    return copy
