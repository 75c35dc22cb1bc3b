"""`regraft inspect`: what a checkpoint is, from its headers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regraft.cli.console import human_bytes, print_json
from regraft.cli.options import Json, Model, Revision


def inspect(
    checkpoint: Model,
    revision: Revision = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint is: architecture, sizes, dtypes, files. Reads headers only."""
    from regraft.core.host import host
    from regraft.core.inspect import describe, describe_tensors
    from regraft.core.sources import open_checkpoint

    plugins = host()
    opened = open_checkpoint(checkpoint, revision=revision, extra=plugins.sources())
    facts = describe(opened, plugins.architectures())
    listed = describe_tensors(opened) if tensors else []
    if as_json:
        print_json({**facts, "tensor_list": listed} if tensors else facts)
        return
    _print(facts)
    for item in listed:
        print(f"  {item['name']}  {item['dtype']} {item['shape']}")


def _print(facts: dict[str, Any]) -> None:
    size = f"{facts['parameters'] / 1e6:,.1f} M parameters, {human_bytes(facts['bytes'])}"
    print(f"{facts['checkpoint']}: {facts['model_type']}, {size}")
    for label in (
        "architectures",
        "sizes",
        "rope",
        "max_position_embeddings",
        "dtypes",
        "weight_files",
        "files",
        "not_carried",
    ):
        value = facts[label]
        if value:
            print(f"  {label.replace('_', ' ')}: {_text(value)}")
    for note in facts["notes"]:
        print(f"  note: {note}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
