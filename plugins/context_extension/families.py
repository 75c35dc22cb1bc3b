"""What the stock classes do with positions: a row per model family, tested against those classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from regraft.core.errors import Unsupported

SCALED_TYPES = frozenset({"linear", "yarn", "llama3"})
"""Rope types beside `default` whose formula is the same in every class."""

Windows = Literal["none", "some", "all"]


@dataclass(frozen=True, kw_only=True)
class RotaryFamily:
    """Rotary positions of one model family.

    Args:
        stock_class: the causal language model of transformers.
        theta: the base of a config that names none.
        partial: rotary share of the head dimensions of a config that names none.
        head_dim: width of a head of a config that names none; None: hidden_size over num_attention_heads.
        nullable_head_dim: the config class turns a missing `head_dim` into null, at which stock YaRN breaks.
        theta_key, partial_key: where configs older than `rope_parameters` keep the two.
        rope_types: what the config class accepts.
        nested: key of config.json under which the text model's config stands.
        local_key, local_theta: base of sliding layers, where full-attention layers have rope parameters of their own.
        windows: which layers a sliding window is for: none, all, all or some where `use_sliding_window` says so, every
            second or so, or only layers without rotary positions.
        window: the `sliding_window` of a config that names none.
        attention: the stock attention function that queries pass through (`sdpa`, or `eager` where that alone has what
            the model needs); None if the model does not use the attention interface.
        renamed: weights whose names in checkpoints differ from the class's by rule of the class's name.
    """

    stock_class: str
    theta: float = 10_000.0
    partial: float = 1.0
    head_dim: int | None = None
    nullable_head_dim: bool = False
    theta_key: str = "rope_theta"
    partial_key: str = "partial_rotary_factor"
    rope_types: frozenset[str] = SCALED_TYPES
    nested: str = ""
    local_key: str = ""
    local_theta: float = 0.0
    windows: Literal["never", "all", "switch-all", "switch-some", "alternating", "unrotated"] = "never"
    window: int | None = None
    attention: Literal["sdpa", "eager"] | None = "sdpa"
    renamed: Mapping[str, str] = field(default_factory=dict)


_GEMMA3 = RotaryFamily(
    stock_class="Gemma3ForCausalLM",
    theta=1_000_000.0,
    head_dim=256,
    local_key="rope_local_base_freq",
    local_theta=10_000.0,
    windows="alternating",
    window=4096,
)

FAMILIES: Mapping[str, RotaryFamily] = MappingProxyType(
    {
        "llama": RotaryFamily(stock_class="LlamaForCausalLM"),
        "mistral": RotaryFamily(stock_class="MistralForCausalLM", windows="all", window=4096),
        "mixtral": RotaryFamily(
            stock_class="MixtralForCausalLM", theta=1_000_000.0, nullable_head_dim=True, windows="all"
        ),
        "qwen2": RotaryFamily(stock_class="Qwen2ForCausalLM", windows="switch-some", window=4096),
        "qwen3": RotaryFamily(stock_class="Qwen3ForCausalLM", head_dim=128, windows="switch-some", window=4096),
        "qwen3_moe": RotaryFamily(stock_class="Qwen3MoeForCausalLM", windows="switch-all", window=4096),
        "gemma": RotaryFamily(stock_class="GemmaForCausalLM", head_dim=256),
        "gemma2": RotaryFamily(
            stock_class="Gemma2ForCausalLM", head_dim=256, windows="alternating", window=4096, attention="eager"
        ),
        "gemma3_text": _GEMMA3,
        "gemma3": replace(_GEMMA3, stock_class="Gemma3ForConditionalGeneration", nested="text_config", attention=None),
        "phi": RotaryFamily(stock_class="PhiForCausalLM", partial=0.5),
        "phi3": RotaryFamily(stock_class="Phi3ForCausalLM", rope_types=frozenset(), windows="all"),
        "gpt_neox": RotaryFamily(
            stock_class="GPTNeoXForCausalLM",
            partial=0.25,
            theta_key="rotary_emb_base",
            partial_key="rotary_pct",
            renamed={"embed_out": "lm_head"},
        ),
        "olmo": RotaryFamily(stock_class="OlmoForCausalLM"),
        "olmo2": RotaryFamily(stock_class="Olmo2ForCausalLM"),
        "glm": RotaryFamily(stock_class="GlmForCausalLM", partial=0.5, head_dim=128),
        "glm4": RotaryFamily(stock_class="Glm4ForCausalLM", partial=0.5, head_dim=128),
        "granite": RotaryFamily(stock_class="GraniteForCausalLM"),
        "cohere": RotaryFamily(stock_class="CohereForCausalLM", theta=500_000.0),
        "falcon": RotaryFamily(stock_class="FalconForCausalLM", attention=None),
        "smollm3": RotaryFamily(stock_class="SmolLM3ForCausalLM", theta=2_000_000.0, windows="unrotated"),
        "starcoder2": RotaryFamily(stock_class="Starcoder2ForCausalLM", windows="all"),
        "stablelm": RotaryFamily(stock_class="StableLmForCausalLM", partial=0.25),
    }
)

_REFUSED = {
    "gpt2": "its positions are a learned table, not rotary",
    "opt": "its positions are a learned table, not rotary",
    "gpt_bigcode": "its positions are a learned table, not rotary",
    "bloom": "its positions are ALiBi biases, not rotary",
    "mpt": "its positions are ALiBi biases, not rotary",
    "cohere2": "its rotary layers see only their sliding window, and its full-attention layers have no "
    "positions at all: there is nothing to extend",
    "ministral3": "its queries carry a position-dependent scale already, tied to the window in its rope_parameters",
}


def family_of(config: Mapping[str, Any]) -> RotaryFamily:
    """The row for a checkpoint's config.json.

    Raises:
        Unsupported: the positions of this family are not rotary, or it is not known how they are configured.
    """
    model_type = str(config.get("model_type"))
    if model_type in _REFUSED:
        remedy = (
            "start from the checkpoint that was not extended yet"
            if model_type == "ministral3"
            else "choose a model with rotary positions, such as llama, qwen2 or gpt_neox"
        )
        raise Unsupported(
            f"cannot extend the context of {model_type}: {_REFUSED[model_type]}",
            where="config.json: model_type",
            remedy=remedy,
        )
    if model_type == "falcon" and config.get("alibi"):
        raise Unsupported(
            "cannot extend the context of a falcon with ALiBi: its positions are biases, not rotary",
            where="config.json: alibi",
            expected="false",
            found="true",
            remedy="choose a falcon with rotary positions (alibi false)",
        )
    if model_type not in FAMILIES:
        raise Unsupported(
            "it is not known how this family configures its rotary positions",
            where="config.json: model_type",
            expected=f"one of {', '.join(FAMILIES)}",
            found=model_type,
            remedy="choose a model of one of these families",
        )
    return FAMILIES[model_type]


def windows_of(family: RotaryFamily, config: Mapping[str, Any], length: int) -> Windows:
    """Which of the rotary layers look back over less than `length` positions, by the text model's `config`."""
    window = config.get("sliding_window", family.window)
    if family.windows in ("never", "unrotated") or window is None or window >= length:
        return "none"
    if family.windows.startswith("switch") and not config.get("use_sliding_window"):
        return "none"
    if family.windows == "switch-some":
        types = config.get("layer_types")
        full = "full_attention" in types if types else config.get("max_window_layers", 28) > 0
        return "some" if full else "all"
    return "some" if family.windows == "alternating" else "all"
