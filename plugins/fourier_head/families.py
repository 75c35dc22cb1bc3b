"""Model families whose head can be replaced: the stock classes, and what those do to logits behind the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from regraft.core.architectures import Family
from regraft.core.architectures.families import built_in
from regraft.core.architectures.family import Part, Settings
from regraft.core.errors import Unsupported

PREFIX = "fourier_"
"""What the `model_type` of a model with the head begins with: stock transformers knows none, and refuses."""

SEGMENTS_PREFIX = "segments_"
"""Likewise, of a model that forecasts segments of series."""

_HEAD = "lm_head"


@dataclass(frozen=True)
class StockFamily:
    """A family whose causal language model ends in `lm_head`, a linear layer without bias.

    Args:
        stock_class, config_class: names in transformers.
        softcap: key of the config for c of c·tanh(z / c) on logits.
        scale: key of the config for a factor of logits.
        divides: whether logits are divided by it.
    """

    stock_class: str
    config_class: str
    softcap: str = ""
    scale: str = ""
    divides: bool = False

    def factor(self, value: float) -> float:
        """What logits are multiplied by, where the key of the scale has this value."""
        return 1 / float(value) if self.divides else float(value)

    def neutral(self) -> dict[str, Any]:
        """Config keys, and the values with which the stock class leaves logits alone."""
        found: dict[str, Any] = {self.softcap: None} if self.softcap else {}
        return found | ({self.scale: 1.0} if self.scale else {})


def _named(name: str, **more: Any) -> StockFamily:
    return StockFamily(f"{name}ForCausalLM", f"{name}Config", **more)


FAMILIES: Mapping[str, StockFamily] = MappingProxyType(
    {
        "llama": _named("Llama"),
        "mistral": _named("Mistral"),
        "ministral3": _named("Ministral3"),
        "qwen2": _named("Qwen2"),
        "qwen3": _named("Qwen3"),
        "gemma2": _named("Gemma2", softcap="final_logit_softcapping"),
        "gemma3_text": StockFamily("Gemma3ForCausalLM", "Gemma3TextConfig", softcap="final_logit_softcapping"),
        "phi3": _named("Phi3"),
        "gpt2": StockFamily("GPT2LMHeadModel", "GPT2Config"),
        "gpt_neox": _named("GPTNeoX"),
        "olmo2": _named("Olmo2"),
        "glm4": _named("Glm4"),
        "granite": _named("Granite", scale="logits_scaling", divides=True),
        "cohere2": _named("Cohere2", scale="logit_scale"),
        "falcon": _named("Falcon"),
        "smollm3": _named("SmolLM3"),
    }
)
"""By `model_type`. Mixtures of experts are not here: transformers fuses their tensors by the model type's name."""

DEFAULTS: Mapping[tuple[str, str], float | None] = MappingProxyType(
    {
        ("gemma2", "final_logit_softcapping"): 30.0,
        ("gemma3_text", "final_logit_softcapping"): None,
        ("granite", "logits_scaling"): 1.0,
        ("cohere2", "logit_scale"): 0.0625,
    }
)
"""What those keys mean where config.json has none."""


def family_of(config: Mapping[str, Any]) -> StockFamily:
    """The family of a checkpoint.

    Raises:
        Unsupported: its head cannot be replaced, or has been.
    """
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    fourier, segments = (model_type.startswith(prefix) for prefix in (PREFIX, SEGMENTS_PREFIX))
    again = fourier or segments
    fault = "the model forecasts segments already" if segments else "the head of this family cannot be replaced"
    raise Unsupported(
        "the model has a Fourier head already" if fourier else fault,
        where="config.json: model_type",
        expected=", ".join(FAMILIES),
        found=model_type,
        remedy="start from the checkpoint before that step" if again else "use a model of one of these families",
    )


def setting(config: Mapping[str, Any], key: str) -> Any:
    """A key of config.json, or what its absence means in this family."""
    return config.get(key, DEFAULTS.get((str(config["model_type"]), key)))


def head_families() -> Sequence[Family]:
    """Rows for models with the head, so that every command knows their tensors: for `regraft_architectures`."""
    rows = built_in()
    return [_with_head(rows[name]) for name in FAMILIES]


def _with_head(family: Family) -> Family:
    body = tuple(part for part in family.parts if part.path != _HEAD)
    settle = family.settle

    def settled(settings: Settings) -> Mapping[str, Any]:
        own = dict(settle(settings)) if settle else {}
        return {**own, **_sizes(settings)}

    return replace(
        family,
        model_type=PREFIX + family.model_type,
        name=f"{family.label} with a Fourier head",
        parts=(*body, *_HEAD_PARTS),
        settle=settled,
    )


def _sizes(settings: Settings) -> dict[str, Any]:
    block = _block(settings)
    linear = block["gate"] == "linear"
    return {
        "fourier_text_rows": settings["vocab_size"] - block["bins"],
        "fourier_gate_rows": 1 if linear else block["bins"],
        "fourier_gate_bias": linear,
        "fourier_rows": 2 * (block["num_frequencies"] + 1),
    }


def _block(settings: Settings) -> Mapping[str, Any]:
    """The head's settings; those of a config without them fit no tensors, which the comparison with these shows."""
    nothing = {"mode": "hybrid", "tied": False, "gate": "linear", "bins": 0, "num_frequencies": 0}
    return {**nothing, **(settings.get("fourier_head") or {})}


def _hybrid(settings: Settings, layer: int) -> bool:
    del layer
    return bool(_block(settings)["mode"] == "hybrid")


def _replaced(settings: Settings, layer: int) -> bool:
    return not _hybrid(settings, layer)


def _gated(settings: Settings, layer: int) -> bool:
    block = _block(settings)
    return _hybrid(settings, layer) and (block["gate"] == "linear" or not block["tied"])


def _part(path: str, role: str, rows: str, when: Any, *, bias: str | bool = False) -> Part:
    return Part(path=path, roles=((role, rows),), columns="hidden_size", bias=bias, outside=True, when=when)


_HEAD_PARTS = (
    _part(_HEAD, "lm_head", "fourier_text_rows", _hybrid),
    _part(f"{_HEAD}.gate", "fourier_gate", "fourier_gate_rows", _gated, bias="fourier_gate_bias"),
    _part(f"{_HEAD}.fourier", "fourier_coefficients", "fourier_rows", _hybrid, bias=True),
    _part(f"{_HEAD}.fourier", "lm_head", "fourier_rows", _replaced, bias=True),
)
"""In hybrid mode the head's own rows are those of text; in replace mode the coefficients are all there is."""


def segment_families() -> Sequence[Family]:
    """Rows for models that forecast segments."""
    rows = built_in()
    return [_with_segments(rows[name]) for name in FAMILIES]


def _with_segments(family: Family) -> Family:
    settle = family.settle

    def settled(settings: Settings) -> Mapping[str, Any]:
        own = dict(settle(settings)) if settle else {}
        block = _segments(settings)
        inputs, width = block["length"], block.get("width")
        sizes = {"segment_length": inputs, "segment_width": width or 0, "segment_to": width or inputs}
        return {**own, **sizes, "segment_from": width or settings.get("hidden_size")}

    return replace(
        family,
        model_type=SEGMENTS_PREFIX + family.model_type,
        name=f"{family.label} that forecasts segments",
        parts=(*family.parts, *_SEGMENT_PARTS),
        settle=settled,
    )


def _segments(settings: Settings) -> Mapping[str, Any]:
    """The forecaster's settings; those of a config without them fit no tensors, which the comparison shows."""
    return {"length": 0, "stamps": False, **(settings.get("segments") or {})}


def _deep(settings: Settings, layer: int) -> bool:
    del layer
    return bool(_segments(settings).get("width"))


def _stamped(settings: Settings, layer: int) -> bool:
    del layer
    return bool(_segments(settings)["stamps"])


def _map(path: str, rows: str, columns: str, when: Any = None) -> Part:
    role = path.replace(".", "_")
    return Part(path=path, roles=((role, rows),), columns=columns, bias=True, outside=True, when=when)


_SEGMENT_PARTS = (
    _map("ts.encoder.hidden", "segment_width", "segment_length", _deep),
    _map("ts.encoder", "hidden_size", "segment_to"),
    _map("ts.decoder.hidden", "segment_width", "hidden_size", _deep),
    _map("ts.decoder", "segment_length", "segment_from"),
    Part(path="ts.mix_scale", roles=(("ts_mix_scale", 1),), parameter=True, outside=True, when=_stamped),
)
