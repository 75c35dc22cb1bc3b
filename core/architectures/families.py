"""The table of built-in families: where stock transformers classes keep their roles, and what their configs default to.

Every row is tested against the stock class: tensor names and shapes, defaults, and which rows are which head's. The
norms of a layer are named for what they do: `input_norm` and `mlp_norm` feed attention and MLP, `attention_output_norm`
and `mlp_output_norm` stand behind them. A family whose attention and MLP share a norm has no `mlp_norm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from regraft.core.architectures.builders import (
    ATTENTION,
    PRE_NORMS,
    SANDWICH_NORMS,
    attention,
    decoder,
    experts,
    fused_mlp,
    gated_mlp,
    norms,
    qk_norms,
    sizes,
)
from regraft.core.architectures.family import ROTARY_LEFTOVER, Family, Settings, embedding, head, linear, norm

_BIASED_ATTENTION = attention(bias="attention_bias")
_SWITCH = {"attention_bias": False}
_SWITCHES = {"attention_bias": False, "mlp_bias": False}
_GEMMA3_PARTS = decoder(_BIASED_ATTENTION, qk_norms(), gated_mlp(), SANDWICH_NORMS)
_GEMMA3_SIZES = sizes(262208, 2304, 9216, 26, 8, 4, 256, tied=True, **_SWITCH)


def _llama_like() -> tuple[Family, ...]:
    biased = decoder(_BIASED_ATTENTION, gated_mlp(bias="mlp_bias"), PRE_NORMS)
    plain = decoder(attention(), gated_mlp(), PRE_NORMS)
    return (
        Family(model_type="llama", parts=biased, defaults=sizes(32000, 4096, 11008, 32, 32, **_SWITCHES)),
        Family(model_type="granite", parts=biased, defaults=sizes(32000, 4096, 11008, 32, 32, **_SWITCHES)),
        Family(
            model_type="smollm3", parts=biased, defaults=sizes(128256, 2048, 11008, 36, 16, 4, tied=True, **_SWITCHES)
        ),
        Family(model_type="mistral", parts=plain, defaults=sizes(32000, 4096, 14336, 32, 32, 8)),
        Family(model_type="ministral3", parts=plain, defaults=sizes(131072, 4096, 14336, 34, 32, 8, 128)),
        Family(
            model_type="qwen2",
            parts=decoder(attention(bias=True, o_bias=False), gated_mlp(), PRE_NORMS),
            defaults=sizes(151936, 4096, 22016, 32, 32, 32),
        ),
        Family(
            model_type="qwen3",
            parts=decoder(_BIASED_ATTENTION, qk_norms(), gated_mlp(), PRE_NORMS),
            defaults=sizes(151936, 4096, 22016, 32, 32, 32, 128, **_SWITCH),
        ),
        Family(
            model_type="cohere2",
            parts=decoder(_BIASED_ATTENTION, gated_mlp(), norms(input_norm="input_layernorm")),
            defaults=sizes(256000, 8192, 22528, 40, 64, tied=True, **_SWITCH),
        ),
        Family(
            model_type="olmo2",
            parts=decoder(
                _BIASED_ATTENTION,
                qk_norms("q_size", "kv_size"),
                gated_mlp(),
                norms(attention_output_norm="post_attention_layernorm", mlp_output_norm="post_feedforward_layernorm"),
            ),
            defaults=sizes(50304, 4096, 11008, 32, 32, **_SWITCH),
        ),
        Family(
            model_type="glm4",
            parts=decoder(
                attention(bias="attention_bias", o_bias=False),
                fused_mlp(),
                PRE_NORMS,
                norms(attention_output_norm="post_self_attn_layernorm", mlp_output_norm="post_mlp_layernorm"),
            ),
            defaults=sizes(151552, 4096, 13696, 40, 32, 2, 128, attention_bias=True),
        ),
        Family(
            model_type="phi3",
            parts=decoder(
                (
                    linear(ATTENTION + "qkv_proj", q_proj="q_size", k_proj="kv_size", v_proj="kv_size"),
                    linear(ATTENTION + "o_proj", o_proj="hidden_size", columns="q_size"),
                ),
                fused_mlp(),
                PRE_NORMS,
            ),
            defaults=sizes(32064, 3072, 8192, 32, 32),
        ),
    )


def _gemmas() -> tuple[Family, ...]:
    return (
        Family(
            model_type="gemma2",
            parts=decoder(_BIASED_ATTENTION, gated_mlp(), SANDWICH_NORMS),
            defaults=sizes(256000, 2304, 9216, 26, 8, 4, 256, tied=True, **_SWITCH),
            norm_offset=1.0,
        ),
        Family(model_type="gemma3_text", name="gemma3", parts=_GEMMA3_PARTS, defaults=_GEMMA3_SIZES, norm_offset=1.0),
        Family(
            model_type="gemma3",
            parts=(*_GEMMA3_PARTS[:-1], head(stored=("language_model.lm_head",))),
            defaults=_GEMMA3_SIZES,
            base="model.language_model",
            stored_bases=("language_model.model",),
            nested="text_config",
            beside=(
                "vision_tower.",
                "multi_modal_projector.",
                "model.vision_tower.",
                "model.multi_modal_projector.",
            ),
            norm_offset=1.0,
        ),
    )


def _sparse(settings: Settings, layer: int) -> bool:
    step = settings["decoder_sparse_step"]
    listed = layer in (settings["mlp_only_layers"] or ())
    return not listed and settings["num_local_experts"] > 0 and (layer + 1) % step == 0


def _dense(settings: Settings, layer: int) -> bool:
    return not _sparse(settings, layer)


def _mixtures() -> tuple[Family, ...]:
    expert_count = {"num_local_experts": ("num_experts",)}
    mixtral = experts(stored="block_sparse_moe", projections=("w1", "w3", "w2"), size="intermediate_size")
    qwen3 = experts(
        stored="mlp", projections=("gate_proj", "up_proj", "down_proj"), size="moe_intermediate_size", when=_sparse
    )
    return (
        Family(
            model_type="mixtral",
            parts=decoder(attention(), mixtral, PRE_NORMS),
            defaults=sizes(32000, 4096, 14336, 32, 32, 8, num_local_experts=8),
            aliases=expert_count,
        ),
        Family(
            model_type="qwen3_moe",
            parts=decoder(_BIASED_ATTENTION, qk_norms(), qwen3, gated_mlp(when=_dense), PRE_NORMS),
            defaults=sizes(
                151936,
                2048,
                6144,
                24,
                32,
                4,
                **_SWITCH,
                num_local_experts=128,
                moe_intermediate_size=768,
                decoder_sparse_step=1,
                mlp_only_layers=None,
            ),
            aliases=expert_count,
        ),
    )


def _as_many_kv_heads(settings: Settings) -> dict[str, Any]:
    """These classes read neither `num_key_value_heads` nor `head_dim` from the config."""
    return {"num_key_value_heads": settings["num_attention_heads"], "head_dim": None}


def _gpt2_sizes(settings: Settings) -> dict[str, Any]:
    inner = settings["intermediate_size"]
    return {"intermediate_size": 4 * settings["hidden_size"] if inner is None else inner, **_as_many_kv_heads(settings)}


def _gpt2() -> Family:
    layer = "h.{layer}."
    return Family(
        model_type="gpt2",
        parts=(
            embedding("wte", "embed_tokens"),
            embedding("wpe", "position_embeddings", "max_position_embeddings"),
            norm(layer + "ln_1", "input_norm", bias=True),
            linear(
                layer + "attn.c_attn", q_proj="q_size", k_proj="kv_size", v_proj="kv_size", bias=True, transposed=True
            ),
            linear(layer + "attn.c_proj", o_proj="hidden_size", columns="q_size", bias=True, transposed=True),
            norm(layer + "ln_2", "mlp_norm", bias=True),
            linear(layer + "mlp.c_fc", up_proj="intermediate_size", bias=True, transposed=True),
            linear(
                layer + "mlp.c_proj", down_proj="hidden_size", columns="intermediate_size", bias=True, transposed=True
            ),
            norm("ln_f", "final_norm", bias=True),
            head(),
        ),
        defaults=sizes(50257, 768, None, 12, 12, tied=True, max_position_embeddings=1024),
        base="transformer",
        aliases={
            "hidden_size": ("n_embd",),
            "num_hidden_layers": ("n_layer",),
            "num_attention_heads": ("n_head",),
            "intermediate_size": ("n_inner",),
            "max_position_embeddings": ("n_positions",),
        },
        settle=_gpt2_sizes,
        leftovers=(r"\.attn\.bias$",),
    )


def _gpt_neox() -> Family:
    layer = "layers.{layer}."
    attn, mlp = layer + "attention.", layer + "mlp."
    return Family(
        model_type="gpt_neox",
        parts=(
            embedding("embed_in", "embed_tokens"),
            norm(layer + "input_layernorm", "input_norm", bias=True),
            norm(layer + "post_attention_layernorm", "mlp_norm", bias=True),
            linear(
                attn + "query_key_value",
                q_proj="q_size",
                k_proj="kv_size",
                v_proj="kv_size",
                bias="attention_bias",
                interleaved=True,
            ),
            linear(attn + "dense", o_proj="hidden_size", columns="q_size", bias="attention_bias"),
            linear(mlp + "dense_h_to_4h", up_proj="intermediate_size", bias=True),
            linear(mlp + "dense_4h_to_h", down_proj="hidden_size", columns="intermediate_size", bias=True),
            norm("final_layer_norm", "final_norm", bias=True),
            head(stored=("embed_out",)),
        ),
        defaults=sizes(50432, 6144, 24576, 44, 64, attention_bias=True),
        base="gpt_neox",
        settle=_as_many_kv_heads,
        leftovers=(ROTARY_LEFTOVER, r"\.attention\.(masked_)?bias$"),
    )


def _falcon_sizes(settings: Settings) -> dict[str, Any]:
    """Key-value heads: as configured in the new decoder, one with multi-query attention, else one per head."""
    heads = settings["num_attention_heads"]
    configured = settings["num_kv_heads"] or heads
    kv_heads = configured if settings["new_decoder_architecture"] else 1 if settings["multi_query"] else heads
    inner = settings["intermediate_size"]
    ln_count = settings["num_ln_in_parallel_attn"]
    if ln_count is None and settings["new_decoder_architecture"]:
        ln_count = 2
    return {
        "num_key_value_heads": kv_heads,
        "head_dim": None,
        "intermediate_size": 4 * settings["hidden_size"] if inner is None else inner,
        "num_ln_in_parallel_attn": ln_count,
    }


def _two_parallel_norms(settings: Settings, layer: int) -> bool:
    del layer
    return bool(settings["parallel_attn"]) and settings["num_ln_in_parallel_attn"] == 2


def _one_input_norm(settings: Settings, layer: int) -> bool:
    return not _two_parallel_norms(settings, layer)


def _in_sequence(settings: Settings, layer: int) -> bool:
    del layer
    return not settings["parallel_attn"]


def _falcon() -> Family:
    layer = "h.{layer}."
    attn, mlp = layer + "self_attention.", layer + "mlp."
    return Family(
        model_type="falcon",
        parts=(
            embedding("word_embeddings", "embed_tokens"),
            norm(layer + "input_layernorm", "input_norm", bias=True, when=_one_input_norm),
            norm(layer + "post_attention_layernorm", "mlp_norm", bias=True, when=_in_sequence),
            norm(layer + "ln_attn", "input_norm", bias=True, when=_two_parallel_norms),
            norm(layer + "ln_mlp", "mlp_norm", bias=True, when=_two_parallel_norms),
            linear(
                attn + "query_key_value",
                q_proj="q_size",
                k_proj="kv_size",
                v_proj="kv_size",
                bias="bias",
                interleaved=True,
            ),
            linear(attn + "dense", o_proj="hidden_size", columns="q_size", bias="bias"),
            linear(mlp + "dense_h_to_4h", up_proj="intermediate_size", bias="bias"),
            linear(mlp + "dense_4h_to_h", down_proj="hidden_size", columns="intermediate_size", bias="bias"),
            norm("ln_f", "final_norm", bias=True),
            head(),
        ),
        defaults=sizes(
            65024,
            4544,
            None,
            32,
            71,
            tied=True,
            bias=False,
            num_kv_heads=None,
            multi_query=True,
            new_decoder_architecture=False,
            parallel_attn=True,
            num_ln_in_parallel_attn=None,
        ),
        base="transformer",
        aliases={"hidden_size": ("n_embed",), "intermediate_size": ("ffn_hidden_size",)},
        settle=_falcon_sizes,
    )


@cache
def built_in() -> Mapping[str, Family]:
    """The built-in families by `model_type`."""
    rows = (*_llama_like(), *_gemmas(), *_mixtures(), _gpt2(), _gpt_neox(), _falcon())
    return MappingProxyType({row.model_type: row for row in rows})
