"""Building blocks of the table of families: the parts that most decoders share, under llama's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regraft.core.architectures.family import Part, Settings, embedding, head, linear, norm

LAYER = "layers.{layer}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."

Condition = Callable[[Settings, int], bool]


def attention(*, bias: bool | str = False, o_bias: bool | str | None = None) -> tuple[Part, ...]:
    """Llama's four attention projections; `o_bias` where the output projection's bias follows another rule."""
    return (
        linear(ATTENTION + "q_proj", q_proj="q_size", bias=bias),
        linear(ATTENTION + "k_proj", k_proj="kv_size", bias=bias),
        linear(ATTENTION + "v_proj", v_proj="kv_size", bias=bias),
        linear(ATTENTION + "o_proj", o_proj="hidden_size", columns="q_size", bias=bias if o_bias is None else o_bias),
    )


def qk_norms(q_size: str = "head_dim", k_size: str = "head_dim") -> tuple[Part, ...]:
    """Norms of queries and keys: over each head, or over all of them where the sizes are those of the projections."""
    return norm(ATTENTION + "q_norm", "q_norm", q_size), norm(ATTENTION + "k_norm", "k_norm", k_size)


def gated_mlp(*, bias: bool | str = False, when: Condition | None = None) -> tuple[Part, ...]:
    """Llama's three MLP projections."""
    return (
        linear(MLP + "gate_proj", gate_proj="intermediate_size", bias=bias, when=when),
        linear(MLP + "up_proj", up_proj="intermediate_size", bias=bias, when=when),
        linear(MLP + "down_proj", down_proj="hidden_size", columns="intermediate_size", bias=bias, when=when),
    )


def fused_mlp() -> tuple[Part, ...]:
    """A gated MLP whose gate and up projections are one tensor."""
    return (
        linear(MLP + "gate_up_proj", gate_proj="intermediate_size", up_proj="intermediate_size"),
        linear(MLP + "down_proj", down_proj="hidden_size", columns="intermediate_size"),
    )


def experts(
    *, stored: str, projections: tuple[str, str, str], size: str, when: Condition | None = None
) -> tuple[Part, ...]:
    """A router and its experts, which checkpoints hold one by one under `stored`, or stacked as the stock class does.

    Which of the two a checkpoint has is the setting `stacked_experts`, found from its tensors. transformers 5
    reads both and writes back what it read; a model made in memory is written one by one.
    """

    def single(settings: Settings, layer: int) -> bool:
        return not settings["stacked_experts"] and (when is None or when(settings, layer))

    def stacked(settings: Settings, layer: int) -> bool:
        return bool(settings["stacked_experts"]) and (when is None or when(settings, layer))

    gate, up, down = (f"{LAYER}{stored}.experts.{{expert}}.{name}" for name in projections)
    return (
        linear(
            MLP + "gate",
            router="num_local_experts",
            when=when,
            stored=() if stored == "mlp" else (f"{LAYER}{stored}.gate",),
        ),
        linear(gate, gate_proj=size, when=single),
        linear(up, up_proj=size, when=single),
        linear(down, down_proj="hidden_size", columns=size, when=single),
        Part(
            path=MLP + "experts.gate_up_proj",
            roles=(("gate_proj", size), ("up_proj", size)),
            columns="hidden_size",
            experts="num_local_experts",
            parameter=True,
            when=stacked,
        ),
        Part(
            path=MLP + "experts.down_proj",
            roles=(("down_proj", "hidden_size"),),
            columns=size,
            experts="num_local_experts",
            parameter=True,
            when=stacked,
        ),
    )


def norms(bias: bool = False, **names: str) -> tuple[Part, ...]:
    """Norms of a layer: the stock class's name, by role."""
    return tuple(norm(LAYER + name, role, bias=bias) for role, name in names.items())


PRE_NORMS = norms(input_norm="input_layernorm", mlp_norm="post_attention_layernorm")
SANDWICH_NORMS = norms(
    input_norm="input_layernorm",
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
)


def decoder(*parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """A whole llama-like model: embeddings, the given parts of its layers, final norm, head."""
    layers = tuple(part for group in parts for part in group)
    return (embedding("embed_tokens", "embed_tokens"), *layers, norm("norm", "final_norm"), head())


def sizes(
    vocab: int,
    hidden: int,
    intermediate: int | None,
    layers: int,
    heads: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    *,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Defaults of a stock config class."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        **more,
    }
