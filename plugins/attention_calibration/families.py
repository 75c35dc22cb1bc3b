"""Families whose attention can be calibrated: those that hand queries and keys to transformers' attention interface."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.portable_code import refuse_other_code


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family.

    Args:
        stock: the causal language model of transformers.
        attention: its attention function: `eager` where that alone has what the model needs, such as a softcap.
        windows: which layers have a sliding window where `layer_types` does not say: none, all if `sliding_window` is
            set, those that `use_sliding_window` and `max_window_layers` say, or all but every n-th.
        window: the `sliding_window` of a config that names none.
        renamed: weights whose names in checkpoints differ from the class's by rule of the class's name.
    """

    stock: str
    attention: Literal["sdpa", "eager"] = "sdpa"
    windows: Literal["never", "all", "switch"] | int = "never"
    window: int | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(stock="LlamaForCausalLM"),
        "mistral": Family(stock="MistralForCausalLM", windows="all", window=4096),
        "ministral3": Family(stock="Ministral3ForCausalLM", windows="all"),
        "mixtral": Family(stock="MixtralForCausalLM", windows="all"),
        "qwen2": Family(stock="Qwen2ForCausalLM", windows="switch", window=4096),
        "qwen3": Family(stock="Qwen3ForCausalLM", windows="switch", window=4096),
        "qwen3_moe": Family(stock="Qwen3MoeForCausalLM", windows="switch", window=4096),
        "gemma2": Family(stock="Gemma2ForCausalLM", attention="eager", windows=2, window=4096),
        "gemma3_text": Family(stock="Gemma3ForCausalLM", windows=6, window=4096),
        "phi3": Family(stock="Phi3ForCausalLM", windows="all"),
        "gpt2": Family(stock="GPT2LMHeadModel"),
        "gpt_neox": Family(stock="GPTNeoXForCausalLM", renamed={"embed_out": "lm_head"}),
        "olmo": Family(stock="OlmoForCausalLM"),
        "olmo2": Family(stock="Olmo2ForCausalLM"),
        "glm4": Family(stock="Glm4ForCausalLM"),
        "granite": Family(stock="GraniteForCausalLM"),
        "cohere2": Family(stock="Cohere2ForCausalLM", windows=4, window=4096),
        "smollm3": Family(stock="SmolLM3ForCausalLM", windows="switch"),
        "starcoder2": Family(stock="Starcoder2ForCausalLM", windows="all"),
        "stablelm": Family(stock="StableLmForCausalLM"),
    }
)


def family_of(checkpoint: Checkpoint) -> Family:
    """The row for a checkpoint.

    Raises:
        Unsupported: its attention does not go through the interface, is not known to, or is computed by other code.
    """
    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in FAMILIES:
        raise Unsupported(
            "the attention of this family cannot be calibrated",
            where="config.json: model_type",
            expected=f"one that is known to go through transformers' attention interface: {', '.join(FAMILIES)}",
            found=model_type,
            remedy="use a model of one of these families",
        )
    refuse_other_code(checkpoint)
    family = FAMILIES[model_type]
    named = checkpoint.config.get("architectures") or [family.stock]
    if named != [family.stock]:
        raise Unsupported(
            "calibration is written for the causal language model alone",
            where="config.json: architectures",
            expected=family.stock,
            found=", ".join(map(str, named)),
            remedy="use the causal language model",
        )
    if checkpoint.config.get("quantization_config"):
        raise Unsupported("the weights are quantised, and would stay so", where="config.json: quantization_config",
                          remedy="start from the checkpoint before it was quantised")  # fmt: skip
    return family


def windowed_layers(config: Mapping[str, Any], family: Family, num_layers: int) -> frozenset[int]:
    """Layers that look back over a sliding window: their keys leave the cache, and the sums with them."""
    types = config.get("layer_types")
    if isinstance(types, list):
        return frozenset(layer for layer, kind in enumerate(types) if kind != "full_attention")
    if config.get("sliding_window", family.window) is None or family.windows == "never":
        return frozenset()
    if family.windows == "switch":
        first = config.get("max_window_layers", 28) if config.get("use_sliding_window") else num_layers
        return frozenset(range(int(first), num_layers))
    every = 0 if family.windows == "all" else family.windows
    return frozenset(layer for layer in range(num_layers) if not every or (layer + 1) % every)
