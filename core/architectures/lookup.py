"""From config.json and tensor specs to the architecture of a checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from regraft.core.architectures.families import built_in
from regraft.core.architectures.family import Family
from regraft.core.architectures.layout import Layout
from regraft.core.architectures.roles import Architecture
from regraft.core.errors import InputError, Unsupported


def architecture_of(
    config: Mapping[str, Any],
    specs: Collection[str] = (),
    families: Iterable[Family] = (),
    *,
    derive: bool = True,
) -> Architecture:
    """The roles of a checkpoint.

    A family of the table needs neither torch nor transformers. Any other is derived from the module tree of the stock
    class, which imports transformers.

    Args:
        config: config.json.
        specs: tensor specs by name, or just the names; empty if only the config is known, then names are those that
            transformers writes.
        families: rows beside the table, which replace built-in rows of the same `model_type`.
        derive: whether a family outside the table may be derived; False never imports transformers.

    Raises:
        InputError: the config is not valid for the family, or the tensors are not those of such a model.
        Unsupported: the family is not in the table, and may not or cannot be derived.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise InputError(
            "is missing or no name",
            where="config.json: model_type",
            expected="a model family such as llama",
            found=repr(model_type),
            remedy="correct config.json",
        )
    rows = {**built_in(), **{row.model_type: row for row in families}}
    names = frozenset(specs)
    if model_type in rows:
        return resolve(rows[model_type], config, names)
    alternatives = difflib.get_close_matches(model_type, rows)
    if not derive:
        raise Unsupported(
            "the model family is not in regraft's table",
            where="config.json: model_type",
            expected=f"perhaps {' or '.join(alternatives)}" if alternatives else None,
            found=model_type,
            remedy="use a model of a supported family, or describe this one in a plugin (regraft_architectures)",
        )
    from regraft.core.architectures.derive import derive as derived

    family, extra = derived(config, alternatives)
    layout = resolve(family, config, names).layout
    base = f"{family.base}." if family.base else ""
    return Architecture(layout, {_moved(name, base, layout.prefix): shape for name, shape in extra.items()})


def _moved(name: str, base: str, prefix: str) -> str:
    return f"{prefix}{name.removeprefix(base)}" if name.startswith(base) else name


def resolve(family: Family, config: Mapping[str, Any], stored: frozenset[str]) -> Architecture:
    """The architecture of a checkpoint whose family is known. Raises InputError as `architecture_of` does."""
    layout = Layout(family, {**family.settings(config), "stacked_experts": False}, _prefix(family, stored), stored)
    stacks = [part for part in family.parts if part.experts is not None]
    layers = range(layout.size("num_hidden_layers"))
    stacked = any(layout.name(part, layer) in stored for part in stacks for layer in layers)
    return Architecture(replace(layout, settings={**layout.settings, "stacked_experts": stacked}))


def _prefix(family: Family, stored: frozenset[str]) -> str:
    """What stands before base-model paths in the checkpoint, told by where the embeddings, or the final norm, are."""
    prefixes = family.prefixes()
    if not stored:
        return prefixes[0]
    marks = [part.path for role in ("embed_tokens", "final_norm") for part in family.parts if role in part.role_names()]
    for mark in marks:
        for prefix in prefixes:
            if f"{prefix}{mark}.weight" in stored:
                return prefix
    first = ", ".join(sorted(stored)[:3])
    raise InputError(
        f"the tensors are not those of a {family.model_type} model: its embeddings are missing",
        where="config.json: model_type",
        expected=" or ".join(f"{prefix}{marks[0]}.weight" for prefix in prefixes) if marks else None,
        found=first if len(stored) <= 3 else f"{first} and {len(stored) - 3} more",
        remedy="check model_type, and that every shard is there",
    )
