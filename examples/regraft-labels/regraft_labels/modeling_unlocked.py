"""Token classification by a decoder of which some layers see what follows (arXiv 2401.14556).

Needs torch and transformers alone. `config.bidirectional_layers` names the layers without a causal mask; padding is
masked as ever. The attention function has a name of its own, so that a load without this file fails.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaForTokenClassification,
    MistralForTokenClassification,
    Qwen2ForTokenClassification,
    Qwen3ForTokenClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "regraft_unlocked_sdpa"

AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def unlock(body: Any, layers: list[int]) -> None:
    """Take the causal mask off `layers` of a stock decoder.

    Args:
        body: the model without its head, computing attention with `NAME` or `sdpa`.
        layers: counted from 0.
    """
    padding: list[Any] = [None]

    def remember(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        padding[0] = named.get("attention_mask")

    def see_all(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if module.self_attn.config._attn_implementation not in (NAME, "sdpa"):
            raise ValueError(f"unlocked layers need the attention implementation {NAME}")
        mask = padding[0]
        return arguments, {**named, "attention_mask": None if mask is None else mask.bool()[:, None, None, :]}

    body.register_forward_pre_hook(remember, with_kwargs=True)
    for index in layers:
        body.layers[index].self_attn.is_causal = False
        body.layers[index].register_forward_pre_hook(see_all, with_kwargs=True)


class Unlocked:
    """What the four classes below add to their stock class."""

    def __init__(self, config: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(config, *arguments, **named)
        config.attn_implementation = config._attn_implementation
        unlock(self.model, config.bidirectional_layers)  # type: ignore[attr-defined]


class UnlockedLlamaForTokenClassification(Unlocked, LlamaForTokenClassification):
    """Llama."""


class UnlockedMistralForTokenClassification(Unlocked, MistralForTokenClassification):
    """Mistral."""


class UnlockedQwen2ForTokenClassification(Unlocked, Qwen2ForTokenClassification):
    """Qwen2."""


class UnlockedQwen3ForTokenClassification(Unlocked, Qwen3ForTokenClassification):
    """Qwen3."""
