"""Which layer a tensor belongs to and what it does there: the columns and rows of a heat map."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.architectures.layout import OUTSIDE, bias_name
from regraft.core.errors import RegraftError

_NUMBER = re.compile(r"\d+")
_LAYERED = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d{1,3})\.(.+)$")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands.

    Args:
        layer: from 0; None outside the layers.
        role: such as `q_proj`; `q+k+v_proj` for a fused tensor, `q_proj bias` for a bias.
        vector: whether it is known to be a norm or a bias rather than a matrix.
    """

    layer: int | None
    role: str
    vector: bool = False


def places_of(config: Mapping[str, Any], names: Collection[str], families: Sequence[Any] = ()) -> dict[str, Place]:
    """The place of every tensor, in the order of the model.

    Tensors of a known family have the names of their roles; others are told by the number in their name.

    Args:
        config: config.json.
        names: of the tensors.
        families: rows of plugins for `architecture_of`.
    """
    present, found = frozenset(names), dict[str, Place]()
    try:
        for name, place in _known(architecture_of(config, names, families=families, derive=False)):
            if name in present:
                found.setdefault(name, place)  # tied embeddings come before the head
    except RegraftError:
        found = {}
    return found | {name: _guessed(name) for name in names if name not in found}


def _known(architecture: Architecture) -> Iterator[tuple[str, Place]]:
    layout = architecture.layout
    for layer in (OUTSIDE, *range(architecture.num_layers)):
        for part in layout.present(layer):
            role, vector = _joined(part.role_names()), part.columns is None
            number = None if layer == OUTSIDE else layer
            for expert in range(architecture.num_experts) if part.per_expert else (None,):
                name = layout.name(part, layer, expert)
                yield name, Place(number, role, vector)
                yield bias_name(name), Place(number, f"{role} bias", vector=True)


def _joined(roles: Sequence[str]) -> str:
    """`q+k+v_proj` for q_proj, k_proj and v_proj."""
    stems = [role.removesuffix("_proj") for role in roles]
    every = all(role.endswith("_proj") for role in roles)
    return "+".join(stems) + "_proj" if every else "+".join(roles)


def _guessed(name: str) -> Place:
    match = _LAYERED.search(name)
    if match is None:
        return Place(None, name.removesuffix(".weight"))
    parts = [part for part in match[2].removesuffix(".weight").split(".") if not _NUMBER.fullmatch(part)]
    return Place(int(match[1]), ".".join(parts[-2:]))
