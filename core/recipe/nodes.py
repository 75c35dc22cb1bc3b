"""Reading the JSON Schema of a parameter model: what may stand at a place, in words and as names.

A node is a JSON Schema object. The alternatives of a node are what remains when references are followed and unions are
opened; `null` is left out, because TOML cannot write it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError
from pydantic.json_schema import GenerateJsonSchema

from regraft.core.errors import PluginError
from regraft.core.recipe.wording import KeyPath, either, value_text

Node = dict[str, Any]

_STRINGS = {
    "path": "a path", "file-path": "the path of a file", "directory-path": "the path of a folder",
    "output-path": "a path", "data": "a source of data (a file, a folder of files, or a hub id)",
    "model": "a model (a folder, a .safetensors or .gguf file, or a hub id)",
    "date": "a date", "date-time": "a date and time", "time": "a time of day", "duration": "a duration",
    "uri": "a URL", "name": "a name of letters, digits, - _ and ., with a letter or digit first",
    "layer-range": 'a range such as "8-12" or "8-"', "byte-size": 'a size such as "5GB", "500MB" or "2GiB"',
}  # fmt: skip
_PLURALS = {
    "integer": "integers", "number": "numbers", "boolean": "booleans", "string": "strings", "object": "tables",
    "array": "arrays",
}  # fmt: skip
_MAX_INTEGER = 2**63 - 1
"""TOML's own bound, which is not worth words."""
PATH_FORMATS = frozenset({"path", "file-path", "directory-path"})


class UntitledSchema(GenerateJsonSchema):
    """JSON Schema without the titles that pydantic makes up from field names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never: a title that repeats the key tells a reader nothing."""
        del schema
        return False


class Shape:
    """The JSON Schema of one pydantic model, to be asked about places in a value.

    Raises:
        PluginError: a field has a type that JSON Schema cannot express.
    """

    def __init__(self, model: type[BaseModel]) -> None:
        try:
            self.root: Node = model.model_json_schema(schema_generator=UntitledSchema)
        except (PydanticInvalidForJsonSchema, PydanticUserError) as error:
            raise PluginError(
                "the parameters cannot be described by a JSON Schema", where=f"{model.__module__}.{model.__qualname__}",
                found=str(error).partition("\n")[0], remedy="annotate the field with pydantic.WithJsonSchema",
            ) from error  # fmt: skip
        self._definitions: Node = self.root.get("$defs", {})

    def at(self, path: KeyPath, value: Any) -> list[Node]:
        """The alternatives for what stands at `path` in `value`; empty where the schema knows no such place."""
        nodes = self.alternatives(self.root)
        for part in path:
            nodes = [node for node in nodes if not _contradicts(node, value)] or nodes
            nodes = [inner for node in nodes for child in _children(node, part) for inner in self.alternatives(child)]
            value = _item(value, part)
        return nodes

    def alternatives(self, node: Node) -> list[Node]:
        """The node itself, or the members of the union that it is."""
        if "$ref" in node:
            return self.alternatives(self._definitions[node["$ref"].rpartition("/")[2]])
        members = node.get("anyOf") or node.get("oneOf") or node.get("allOf")
        if members:
            return [inner for member in members for inner in self.alternatives(member)]
        return [] if node.get("type") == "null" else [node]

    def keys(self, path: KeyPath, value: Any) -> list[str]:
        """The keys that a table at `path` may have."""
        nodes = self.at(path, value)
        inner = item_at(value, path)
        nodes = [node for node in nodes if not _contradicts(node, inner)] or nodes
        return list(dict.fromkeys(key for node in nodes for key in node.get("properties", {})))

    def describe(self, nodes: list[Node]) -> str:
        """What is expected, such as `an integer of at least 1`; empty if the schema leaves it open."""
        kinds = list(dict.fromkeys(self._kind(node) for node in nodes if not choices([node])))
        if not nodes or "" in kinds:
            return ""
        values = [value_text(choice) for choice in choices(nodes)]
        if len(values) < 2:
            return either([*kinds, *values])
        one_of = f"one of {either(values)}"
        return f"{either(kinds)}, or {one_of}" if kinds else one_of

    def _kind(self, node: Node) -> str:
        match node.get("type"):
            case "string":
                return _string(node)
            case "integer":
                return f"an integer{_bounds(node)}"
            case "number":
                return f"a number{_bounds(node)}"
            case "boolean":
                return "true or false"
            case "object":
                least, most = node.get("minProperties"), node.get("maxProperties")
                return "a table" if least is None and most is None else f"a table of {_span(least, most)} keys"
            case "array":
                return f"an array{self._items(node)}"
        return ""

    def _items(self, node: Node) -> str:
        if "prefixItems" in node:
            return f" of {len(node['prefixItems'])} values"
        kinds = {_PLURALS.get(item.get("type", "")) for item in self.alternatives(node.get("items", {}))}
        noun = kinds.pop() if len(kinds) == 1 else None
        least, most = node.get("minItems"), node.get("maxItems")
        if least is None and most is None:
            return f" of {noun}" if noun else ""
        noun = noun or "values"
        if least == most:
            return f" of {least} {noun}"
        return f" of {_span(least, most)} {noun}"


@lru_cache(maxsize=64)
def shape_of(model: type[BaseModel]) -> Shape:
    """The shape of a model; made once.

    Raises:
        PluginError: a field has a type that JSON Schema cannot express.
    """
    return Shape(model)


def choices(nodes: list[Node]) -> list[Any]:
    """The literal values among the alternatives."""
    found = [choice for node in nodes for choice in ([node["const"]] if "const" in node else node.get("enum", []))]
    return [choice for choice in found if choice is not None]


def _string(node: Node) -> str:
    if phrase := _STRINGS.get(node.get("format", "")):
        return phrase
    least, most = node.get("minLength"), node.get("maxLength")
    if "pattern" in node:
        return f"a string like {node['pattern']}"
    if least == 1 and most is None:
        return "a string that is not empty"
    return "a string" if least is None and most is None else f"a string of {_span(least, most)} characters"


def _span(least: float | None, most: float | None) -> str:
    if least is None:
        return f"at most {most}"
    return f"at least {least}" if most is None else f"{least} to {most}"


def _bounds(node: Node) -> str:
    node = {key: limit for key, limit in node.items() if key != "maximum" or limit < _MAX_INTEGER}
    least, most = node.get("minimum"), node.get("maximum")
    if least is not None and most is not None:
        text = f" from {least} to {most}"
    else:
        limits = [
            f" {words} {node[key]}"
            for key, words in (
                ("minimum", "of at least"), ("exclusiveMinimum", "greater than"),
                ("maximum", "of at most"), ("exclusiveMaximum", "less than"),
            )
            if key in node
        ]  # fmt: skip
        text = " and".join(limits)
    return text + (f" that is a multiple of {node['multipleOf']}" if "multipleOf" in node else "")


def _contradicts(node: Node, value: Any) -> bool:
    """Whether a key of the table `value`, such as the one that tells union members apart, rules this member out."""
    if not isinstance(value, dict):
        return False
    fixed = ((value[key], choices([inner])) for key, inner in node.get("properties", {}).items() if key in value)
    return any(allowed and found not in allowed for found, allowed in fixed)


def _children(node: Node, part: str | int) -> Iterator[Node]:
    if isinstance(part, str):
        inner = node.get("properties", {}).get(part, node.get("additionalProperties"))
    else:
        prefix = node.get("prefixItems", [])
        inner = prefix[part] if part < len(prefix) else node.get("items")
    if isinstance(inner, dict):
        yield inner


def _item(value: Any, part: str | int) -> Any:
    known = isinstance(value, dict) and part in value
    known = known or (isinstance(value, list) and isinstance(part, int) and part < len(value))
    return value[part] if known else None


def item_at(value: Any, path: KeyPath) -> Any:
    """What stands at `path`; None where nothing does."""
    for part in path:
        value = _item(value, part)
    return value
