"""What growth changes in config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError
from regraft.plugins.grow.sizes import Growth

_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4}
"""Every how many layers attention is full, where neither `layer_types` nor `sliding_window_pattern` says so."""


def config_change(checkpoint: Checkpoint, growth: Growth) -> dict[str, Any]:
    """The merge patch of config.json.

    Raises:
        InputError: a list of the layers has another length than there are layers, or rms_norm_eps is missing.
    """
    family = growth.architecture.layout.family
    text = checkpoint.config.get(family.nested, {}) if family.nested else checkpoint.config
    change: dict[str, Any] = {}

    def write(key: str, value: object) -> None:
        names = (*family.aliases.get(key, ()), key)
        change.update(dict.fromkeys([name for name in names if name in text] or names[:1], value))

    if growth.deeper:
        write("num_hidden_layers", len(growth.layers))
        change.update(_per_layer(text, growth))
    for size in ("intermediate_size", "moe_intermediate_size", "hidden_size"):
        if size in growth.sizes:
            write(size, growth.sizes[size][1])
    if "q_size" in growth.sizes:
        write("num_attention_heads", growth.num_heads)
        write("num_key_value_heads", growth.num_kv_heads)
    if {"q_size", "hidden_size"} & set(growth.sizes):
        write("head_dim", growth.architecture.head_dim)
    if "hidden_size" in growth.sizes:
        write("rms_norm_eps", _eps(text) * growth.hidden_ratio)
    return {family.nested: change} if family.nested else change


def _eps(text: Mapping[str, Any]) -> float:
    eps = text.get("rms_norm_eps")
    if isinstance(eps, (int, float)) and not isinstance(eps, bool):
        return float(eps)
    raise InputError("is missing or no number, and a wider model needs a smaller one", expected="a number",
                     where="config.json: rms_norm_eps", found=repr(eps), remedy="add it to config.json")  # fmt: skip


def _per_layer(text: Mapping[str, Any], growth: Growth) -> dict[str, Any]:
    """Lists with an entry for each layer, and those that the class would otherwise work out from a layer's number."""
    change: dict[str, Any] = {}
    for key, rule in _rules(text, growth).items():
        old = _listed(text, key, growth) or (rule and [rule(layer) for layer in range(growth.architecture.num_layers)])
        if old:
            change[key] = [old[source] for source, _ in growth.layers]
    if "decoder_sparse_step" in growth.architecture.settings:
        sparse = [growth.architecture.has("router", source) for source, _ in growth.layers]
        change["mlp_only_layers"] = [layer for layer, routed in enumerate(sparse) if not routed]
        change["decoder_sparse_step"] = 1
    return change


def _listed(text: Mapping[str, Any], key: str, growth: Growth) -> list[Any] | None:
    found, layers = text.get(key), growth.architecture.num_layers
    if found is None:
        return None
    if isinstance(found, list) and len(found) == layers:
        return found
    length = f"{len(found)} entries" if isinstance(found, list) else repr(found)
    raise InputError("does not say what each layer is", where=f"config.json: {key}", expected=f"{layers} entries",
                     found=length, remedy="correct config.json")  # fmt: skip


def _rules(text: Mapping[str, Any], growth: Growth) -> dict[str, Callable[[int], Any] | None]:
    """By key of such a list, what the class takes for a layer if there is no list; None where that is no list."""
    model_type = growth.architecture.model_type
    rules: dict[str, Callable[[int], Any] | None] = {"layer_types": None, "no_rope_layers": None}
    if model_type in _PATTERNS:
        pattern = text.get("sliding_window_pattern", _PATTERNS[model_type]) if model_type != "gemma2" else 2
        rules["layer_types"] = lambda layer: _type((layer + 1) % pattern)
    if model_type in ("qwen2", "qwen3") and text.get("use_sliding_window"):
        first = text.get("max_window_layers", 28)
        rules["layer_types"] = lambda layer: _type(layer >= first and text.get("sliding_window", 4096) is not None)
    if model_type == "smollm3":
        interval = text.get("no_rope_layer_interval", 4)
        rules["no_rope_layers"] = lambda layer: int((layer + 1) % interval != 0)
    return rules


def _type(sliding: object) -> str:
    return "sliding_attention" if sliding else "full_attention"
