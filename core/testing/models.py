"""Tiny random models of every supported family. Nothing heavy is imported until a model is asked for."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDE_HEADS = {"head_dim": 24}
_ALTERNATING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_FALCON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "max_position_embeddings": 128,
    **_IDS,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GEMMA3 = {**_COMMON, **_WIDE_HEADS, **_ALTERNATING, "query_pre_attn_scalar": 24}
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "llama": _COMMON,
        "mistral": {**_COMMON, "sliding_window": None},
        "ministral3": {**_COMMON, **_WIDE_HEADS, "rope_parameters": _YARN},
        "mixtral": {**_COMMON, **_EXPERTS},
        "qwen2": _COMMON,
        "qwen3": {**_COMMON, **_WIDE_HEADS},
        "qwen3_moe": {**_COMMON, **_WIDE_HEADS, **_EXPERTS, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
        "gemma2": {**_COMMON, **_WIDE_HEADS, **_ALTERNATING, "query_pre_attn_scalar": 24},
        "gemma3_text": _GEMMA3,
        "phi3": {**_COMMON, "original_max_position_embeddings": 128},
        "gpt2": {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "n_positions": 128, **_IDS},
        "gpt_neox": {key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
        "olmo2": _COMMON,
        "glm4": {**_COMMON, **_WIDE_HEADS},
        "granite": {
            **_COMMON,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 0.5,
        },
        "cohere2": {**_COMMON, **_ALTERNATING, "logit_scale": 0.5},
        "falcon": {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        "smollm3": {**_COMMON, "no_rope_layers": [1, 0]},
        "gemma3": {"text_config": _GEMMA3, "vision_config": _VISION, "mm_tokens_per_image": 4},
        "starcoder2": _COMMON,
        "stablelm": _COMMON,
        "olmo": _COMMON,
    }
)
"""What `tiny` passes to the config class of each `model_type`; the last three are outside regraft's table."""

OUTSIDE_TABLE = ("starcoder2", "stablelm", "olmo")
"""Families that regraft has no row for and derives."""

FAMILIES: tuple[str, ...] = tuple(name for name in CONFIGS if name not in (*OUTSIDE_TABLE, "gemma3"))
"""Text-only families of regraft's table; `gemma3`, with its vision tower, stands beside them."""

VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
        "llama-tied": ("llama", {"tie_word_embeddings": True}),
        "llama-wide-heads": ("llama", _WIDE_HEADS),
        "llama-multi-head": ("llama", {"num_key_value_heads": 4}),
        "mistral-wide-heads": ("mistral", _WIDE_HEADS),
        "mixtral-tied": ("mixtral", {"tie_word_embeddings": True, **_WIDE_HEADS}),
        "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
        "qwen2-wide-heads": ("qwen2", _WIDE_HEADS),
        "qwen3-biased": ("qwen3", {"attention_bias": True}),
        "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
        "qwen3_moe-all-sparse": ("qwen3_moe", {"mlp_only_layers": [], "attention_bias": True}),
        "qwen3_moe-every-second": ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2}),
        "gemma2-biased": ("gemma2", {"attention_bias": True}),
        "gemma2-untied": ("gemma2", {"tie_word_embeddings": False}),
        "gemma3-biased": ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}),
        "phi3-tied": ("phi3", {"tie_word_embeddings": True}),
        "phi3-multi-head": ("phi3", {"num_key_value_heads": 4}),
        "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
        "gpt2-default-mlp": ("gpt2", {"n_inner": None}),
        "gpt_neox-unbiased": ("gpt_neox", {"attention_bias": False}),
        "gpt_neox-tied": ("gpt_neox", {"tie_word_embeddings": True}),
        "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
        "olmo2-biased": ("olmo2", {"attention_bias": True}),
        "glm4-unbiased": ("glm4", {"attention_bias": False}),
        "granite-biased": ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        "cohere2-biased": ("cohere2", {"attention_bias": True, "tie_word_embeddings": False}),
        "falcon-biased": ("falcon", {"bias": True}),
        "falcon-one-norm": ("falcon", {"num_ln_in_parallel_attn": 1}),
        "falcon-untied": ("falcon", {"tie_word_embeddings": False}),
        "falcon-multi-query": ("falcon", {"new_decoder_architecture": False, "num_kv_heads": None}),
        "falcon-multi-head": (
            "falcon",
            {"new_decoder_architecture": False, "num_kv_heads": None, "multi_query": False, "bias": True},
        ),
        "falcon-sequential": (
            "falcon",
            {"new_decoder_architecture": False, "num_kv_heads": None, "multi_query": False, "parallel_attn": False},
        ),
        "smollm3-biased": ("smollm3", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    }
)
"""The families with their switches thrown: name of the variant to (`model_type`, overrides)."""


def tiny(family: str, *, seed: int = 0, dtype: torch.dtype | None = None, **overrides: Any) -> PreTrainedModel:
    """A tiny random model of `family`, a `model_type` or a name of `VARIANTS`, in eval mode; fp32 by default.

    Two layers, hidden size 64, four heads over two key-value heads where the family has them, vocabulary 128. Weights
    depend on `seed` and on the parameter's name alone, so families that share names share weights, and are wide enough
    that logits have a standard deviation of order one. Norms and biases are random too, so that a forgotten one shows.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, switches = VARIANTS.get(family, (family, {}))
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **switches, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    offset = 0.0 if model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise, offset))
    model = model.to(dtype or torch.float32).eval()
    return model.requires_grad_(False)


def _scaled(name: str, noise: torch.Tensor, norm_offset: float) -> torch.Tensor:
    if noise.ndim == 1:
        return 0.2 * noise if name.endswith("bias") else norm_offset + 0.2 * noise
    return 0.15 * noise


def save_tiny(family: str, folder: Path | str, *, shards: int | str | None = None, tokenizer: bool = False,
              seed: int = 0, dtype: torch.dtype | None = None, **overrides: Any) -> Path:  # fmt: skip
    """Write a tiny model's checkpoint into `folder`, as transformers does, and return the folder.

    Args:
        family: as for `tiny`, like the remaining arguments.
        folder: created if missing.
        shards: largest shard, as `save_pretrained` takes it (bytes, or text such as "40KB"); None writes one file.
        tokenizer: also write a character tokenizer of printable ASCII whose ids fit the vocabulary.
    """
    folder = Path(folder)
    model = tiny(family, seed=seed, dtype=dtype, **overrides)
    model.save_pretrained(folder, **({} if shards is None else {"max_shard_size": shards}))
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path | str) -> None:
    """Write a tokenizer whose tokens are `<pad> <s> </s> <unk>` and the printable ASCII characters: 99 ids.

    It is byte-level, since transformers replaces the pre-tokenizer of some families (qwen2) by its own byte-level one.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    space = "\u0120"  # how byte-level tokenizers write it
    tokens = [*specials, space, *(chr(code) for code in range(33, 127))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
