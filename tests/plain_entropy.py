"""Attention entropy written out: one query and one key at a time, in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def plain_entropy(model: Any, ids: Sequence[int], factor: Callable[[int, int], float] | None = None) -> torch.Tensor:
    """Entropy [layers, heads, positions] of a model with llama's attention.

    Args:
        model: of the classes llama, mistral, qwen2 or ministral3.
        ids: token ids of one text.
        factor: of the logits, by layer and position; None takes the one of Ministral3's config, or 1.
    """
    import torch

    inputs: list[Any] = []
    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    hooks = [
        one.register_forward_pre_hook(lambda module, args, kwargs: inputs.append((module, kwargs)), with_kwargs=True)
        for one in attentions
    ]
    with torch.no_grad():
        model(torch.tensor([list(ids)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    factor = factor or _native_factor(model.config)
    return torch.stack([_layer(number, *one, factor) for number, one in enumerate(inputs)])


def _layer(number: int, module: Any, kwargs: Any, factor: Callable[[int, int], float]) -> torch.Tensor:
    import torch

    config, width = module.config, module.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    window = getattr(config, "sliding_window", None) if config.model_type != "llama" else None
    window = getattr(module, "sliding_window", window)
    states = kwargs["hidden_states"][0].double()
    cos, sin = (one[0].double() for one in kwargs["position_embeddings"])

    def projected(linear: Any, count: int) -> torch.Tensor:
        out = states @ linear.weight.double().T
        if linear.bias is not None:
            out = out + linear.bias.double()
        out = out.view(len(states), count, width)
        half = torch.cat([-out[..., width // 2 :], out[..., : width // 2]], dim=-1)
        return out * cos[:, None] + half * sin[:, None]

    query, key = projected(module.q_proj, heads), projected(module.k_proj, groups)
    result = torch.zeros(heads, len(states), dtype=torch.float64)
    for head in range(heads):
        group = head * groups // heads
        for position in range(len(states)):
            first = 0 if window is None else max(0, position - window + 1)
            t = factor(number, position) / math.sqrt(width)
            logits = [t * float(query[position, head] @ key[other, group]) for other in range(first, position + 1)]
            highest = max(logits)
            weights = [math.exp(logit - highest) for logit in logits]
            total = math.fsum(weights)
            result[head, position] = -math.fsum(w / total * math.log(w / total) for w in weights if w > 0)
    return result


def _native_factor(config: Any) -> Callable[[int, int], float]:
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "ministral3":
        return lambda layer, position: 1.0
    beta, window = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return lambda layer, position: 1 + beta * math.log(1 + position // window)
