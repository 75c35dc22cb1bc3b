"""How a model gets a bias where it has none: by a switch of its config, or by writing it as another stock class."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.architectures.families import built_in
from regraft.core.architectures.lookup import resolve
from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.jsonio import merge
from regraft.core.patch import Patch
from regraft.core.reexpress import TARGETS, Reexpression, reexpress
from regraft.core.reexpress_config import SOURCES

Mode = Literal["auto", "keep-class"]

_SWITCHES = {
    "o_proj": ("attention_out_bias", "attention_bias", "use_bias", "bias", "enable_bias"),
    "down_proj": ("mlp_bias", "use_bias", "bias", "enable_bias"),
    "v_proj": ("use_qkv_bias", "qkv_bias", "attention_bias", "use_bias", "bias", "enable_bias"),
}
"""Keys that stock configs of families outside the table have for biases, the one that adds least first."""

OUTPUTS = {"o_proj": "attention output", "down_proj": "MLP output", "v_proj": "values"}
"""What messages call the output of a projection."""


@dataclass(frozen=True)
class Route:
    """How the biases come about.

    Args:
        architecture: the roles of the result, where every projection asked for has a bias.
        kinds: how each role got it: `in place`, `switch KEY`, or `re-expressed as CLASS`.
        patch: changes of config.json and, for another class, of fused tensors; the biases are still to be added.
    """

    architecture: Architecture
    kinds: Mapping[str, str]
    patch: Patch = field(default_factory=Patch)


def find_route(
    checkpoint: Checkpoint, architecture: Architecture, layers: Mapping[str, Collection[int]], mode: Mode
) -> Route:
    """The first way, of those that the module names, by which every role of `layers` has a bias in its layers.

    Args:
        checkpoint: what the biases are for.
        architecture: its roles.
        layers: by role (`o_proj`, `down_proj`, `v_proj`), the layers that need one.
        mode: `keep-class` leaves out other classes.

    Raises:
        Unsupported: there is no way.
    """
    kinds = {role: "in place" for role in layers if _biased(architecture, role, layers[role])}
    after, change = architecture, dict[str, Any]()
    for role in (role for role in layers if role not in kinds):
        if _biased(after, role, layers[role]):
            kinds[role] = f"switch {', '.join(_leaves(change))}"
            continue
        for key, switched in _switched(checkpoint, after, role, change):
            if _biased(switched, role, layers[role]) and _adds_biases_only(after, switched):
                after, change = switched, merge(change, _nested(architecture, key))
                kinds[role] = f"switch {key}"
                break
    missing = [role for role in layers if role not in kinds]
    if not missing:
        return Route(after, kinds, Patch(json={CONFIG: change} if change else {}))
    if "v_proj" in missing:
        raise _no_way("v_proj", architecture, (), mode)
    found = _reexpressed(checkpoint, architecture, missing, layers, mode)
    kinds = {role: kinds.get(role, f"re-expressed as {found.target}") for role in layers}
    kinds |= {role: f"re-expressed as {found.target}" for role, kind in kinds.items() if kind.startswith("switch")}
    patch = Patch(edits=found.edits, removals=found.removals, json=found.json, dropped=found.dropped, notes=found.notes)
    return Route(found.architecture, kinds, patch)


def _biased(architecture: Architecture, role: str, layers: Collection[int]) -> bool:
    """Whether `role` has a bias in all of `layers`."""
    slots = [architecture.slot(role, layer) for layer in layers if not _expert(architecture, role, layer)]
    return len(slots) == len(layers) and all(slot.bias is not None for slot in slots)


def _expert(architecture: Architecture, role: str, layer: int) -> bool:
    return role == "down_proj" and "router" in architecture.roles(layer)


def _switched(
    checkpoint: Checkpoint, architecture: Architecture, role: str, change: Mapping[str, Any]
) -> Iterator[tuple[str, Architecture]]:
    """Keys that may switch the bias on, and the roles with each of them on."""
    family = architecture.layout.family
    stored = frozenset(checkpoint.specs)
    key = architecture.bias_switch(role)
    if key is not None:
        key = next((name for name in family.aliases.get(key, ()) if name in checkpoint.config), key)
        config = merge(merge(checkpoint.config, change), _nested(architecture, key))
        yield key, resolve(family, config, stored)
    elif family.model_type not in built_in():
        for name in _known_keys(family.model_type, role):
            config = merge(merge(checkpoint.config, change), {name: True})
            yield name, architecture_of(config, stored)


def _known_keys(model_type: str, role: str) -> list[str]:
    """The switches that the stock config class of a family outside the table knows, and does not have on."""
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return []
    stock = CONFIG_MAPPING[model_type]()
    return [name for name in _SWITCHES[role] if isinstance(getattr(stock, name, None), bool)]


def _nested(architecture: Architecture, key: str) -> dict[str, Any]:
    nested = architecture.layout.family.nested
    return {nested: {key: True}} if nested else {key: True}


def _leaves(change: Mapping[str, Any]) -> list[str]:
    return [name for key, value in change.items() for name in (_leaves(value) if isinstance(value, dict) else [key])]


def _adds_biases_only(before: Architecture, after: Architecture) -> bool:
    """Whether a switch leaves every tensor as it is and adds nothing but biases, so that zeros change nothing."""
    old, new = before.expected_specs(), after.expected_specs()
    return old.items() <= new.items() and all(name.endswith(".bias") for name in new.keys() - old.keys())


def _reexpressed(
    checkpoint: Checkpoint,
    architecture: Architecture,
    missing: Collection[str],
    layers: Mapping[str, Collection[int]],
    mode: Mode,
) -> Reexpression:
    reasons: list[Unsupported] = []
    if mode == "auto" and architecture.model_type in SOURCES:
        for target in TARGETS:
            try:
                return reexpress(
                    checkpoint,
                    architecture,
                    target,
                    attention_bias=bool(layers.keys() & {"o_proj", "v_proj"}),
                    mlp_bias="down_proj" in layers,
                )
            except Unsupported as error:
                reasons.append(error)
    role = next(iter(missing))
    for layer in layers[role]:
        if _expert(architecture, role, layer):
            raise Unsupported(
                f"the MLP of layer {layer} is a mixture of experts, whose output has no bias",
                where=f"{architecture.model_type}, layer {layer}",
                remedy="use the attention output (attn_out) of this or the next layer",
            )
    raise _no_way(role, architecture, reasons, mode)


def _no_way(role: str, architecture: Architecture, reasons: Collection[Unsupported], mode: Mode) -> Unsupported:
    family, output = architecture.family, OUTPUTS[role]
    reason = f"the {family} class has no bias for the {output} ({role}), and no switch that adds one"
    if reasons:
        whys = dict.fromkeys(f"{error.message} ({error.where}: {error.found})" for error in reasons)
        reason = f"{reason}; {'; '.join(whys)}"
    elif mode == "keep-class":
        reason = f"{reason}; another class is not to be used (mode keep-class)"
    return Unsupported(reason, where=f"config.json: model_type {architecture.model_type}",
                       remedy=_remedy(role, architecture, mode))  # fmt: skip


def _remedy(role: str, architecture: Architecture, mode: Mode) -> str:
    if role == "v_proj":
        return "use offsets of heads or of the attention output"
    another = "use mode auto, or " if mode == "keep-class" else ""
    values = architecture.has("v_proj", 0) and architecture.slot("v_proj", 0).bias is not None
    if role == "o_proj" and values:
        return f"{another}offsets for whole key-value groups (kv-group), which the biases of v_proj can take up"
    return f"{another}a model of a family with such a bias"
