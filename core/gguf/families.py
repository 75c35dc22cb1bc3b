"""The architectures that regraft reads from GGUF, and how each becomes the config of a stock transformers class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regraft.core.errors import InputError
from regraft.core.gguf.metadata import Metadata
from regraft.core.gguf.names import GEMMA_NORMS, LLAMA_NORMS, Naming, Sizes
from regraft.core.gguf.rope import rope_parameters
from regraft.core.gguf.tensors import GgufFile
from regraft.core.jsonio import brief

_ORIGINAL = "start from the original safetensors checkpoint"
_QKV, _QKVO = frozenset({"attn_q", "attn_k", "attn_v"}), frozenset({"attn_q", "attn_k", "attn_v", "attn_output"})
_MLP = frozenset({"ffn_gate", "ffn_up", "ffn_down"})


@dataclass(frozen=True)
class Model:
    """One file, its metadata and sizes, and the projections that have biases."""

    file: GgufFile
    meta: Metadata
    sizes: Sizes
    biases: frozenset[str]

    def fault(self, message: str, *, expected: object, found: object) -> InputError:
        """An error about this model."""
        return InputError(message, where=self.file.path, expected=expected, found=found, remedy=_ORIGINAL)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        model_type: of transformers.
        class_name: the stock class.
        naming: of its tensors, without the biases.
        extra: config entries beyond the sizes that all share; refuses what the class cannot express.
        gemma_order: the tokenizer merges in the order of the vocabulary, not by score.
    """

    model_type: str
    class_name: str
    naming: Naming
    extra: Callable[[Model], dict[str, Any]]
    gemma_order: bool = False


def family(meta: Metadata) -> Family:
    """The family of a file.

    Raises:
        InputError: its architecture is none that regraft reads.
    """
    if meta.architecture not in FAMILIES:
        raise meta.fault(
            "general.architecture",
            "regraft does not read this architecture from GGUF",
            expected=f"one of {', '.join(FAMILIES)}",
            found=brief(meta.architecture),
            remedy=_ORIGINAL,
        )
    return FAMILIES[meta.architecture]


def _allow_biases(model: Model, *allowed: frozenset[str]) -> None:
    if model.biases not in allowed:
        expected = " or ".join(", ".join(sorted(names)) or "none" for names in allowed)
        raise model.fault(
            "has biases that the stock class cannot hold",
            expected=f"biases on {expected}",
            found=", ".join(sorted(model.biases)) or "none",
        )


def _rotates_all(model: Model) -> int:
    dim = model.meta.integer(model.meta.hyper("rope.dimension_count"), model.sizes.head_dim)
    if dim != model.sizes.head_dim:
        raise model.fault(
            "rotates a part of each head, which the stock class cannot", expected=model.sizes.head_dim, found=dim
        )
    return dim


def _rope(model: Model) -> dict[str, Any]:
    return rope_parameters(model.file, model.meta, dim=_rotates_all(model))


def _llama(model: Model) -> dict[str, Any]:
    attention, mlp = bool(model.biases & _QKVO), bool(model.biases & _MLP)
    _allow_biases(model, (_QKVO if attention else frozenset()) | (_MLP if mlp else frozenset()))
    bias = {"attention_bias": attention, "mlp_bias": mlp}
    return {"hidden_act": "silu", "head_dim": model.sizes.head_dim, **bias, "rope_parameters": _rope(model)}


def _qwen2(model: Model) -> dict[str, Any]:
    _allow_biases(model, _QKV)
    sizes = model.sizes
    head = {} if sizes.head_dim * sizes.num_heads == sizes.hidden_size else {"head_dim": sizes.head_dim}
    return {"hidden_act": "silu", **head, "use_sliding_window": False, "rope_parameters": _rope(model)}


def _qwen3(model: Model) -> dict[str, Any]:
    _allow_biases(model, frozenset(), _QKVO)
    return {
        "hidden_act": "silu",
        "head_dim": model.sizes.head_dim,
        "attention_bias": bool(model.biases),
        "use_sliding_window": False,
        "rope_parameters": _rope(model),
    }


def _gemma(model: Model, large_model_layers: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share.

    The largest model of each alone scales its queries by hidden size / heads; the file does not say so, and llama.cpp
    too goes by the number of layers.
    """
    _allow_biases(model, frozenset())
    sizes, meta = model.sizes, model.meta
    large = sizes.num_layers == large_model_layers
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": sizes.head_dim,
        "attention_bias": False,
        "query_pre_attn_scalar": sizes.hidden_size // sizes.num_heads if large else sizes.head_dim,
        "sliding_window": meta.integer(meta.hyper("attention.sliding_window"), 4096),
    }


def _gemma2(model: Model) -> dict[str, Any]:
    meta = model.meta
    return _gemma(model, 46) | {
        "attn_logit_softcapping": meta.number(meta.hyper("attn_logit_softcapping"), 50.0),
        "final_logit_softcapping": meta.number(meta.hyper("final_logit_softcapping"), 30.0),
        "layer_types": _layer_types(model, 2),
        "rope_parameters": _rope(model),
    }


def _gemma3(model: Model) -> dict[str, Any]:
    meta = model.meta
    softcap = meta.hyper("final_logit_softcapping")
    windowed = meta.has(meta.hyper("attention.sliding_window"))
    dim = _rotates_all(model)
    local = meta.number(meta.hyper("rope.freq_base_swa"), 10000.0)
    return _gemma(model, 62) | {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": meta.number(softcap) if meta.has(softcap) else None,
        "layer_types": _layer_types(model, 6 if windowed else 1),
        "rope_parameters": {
            "full_attention": rope_parameters(model.file, meta, dim=dim, default_theta=1e6),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _layer_types(model: Model, period: int) -> list[str]:
    """Every `period`-th layer attends to everything; a file may say so layer by layer instead."""
    key = model.meta.hyper("attention.sliding_window_pattern")
    if model.meta.has(key) and isinstance(model.meta.values[key], list):
        local = model.meta.sequence(key, bool, model.sizes.num_layers)
    else:
        period = model.meta.integer(key, period) or 1
        local = [(layer + 1) % period != 0 for layer in range(model.sizes.num_layers)]
    return ["sliding_attention" if windowed else "full_attention" for windowed in local]


def _phi3(model: Model) -> dict[str, Any]:
    _allow_biases(model, frozenset())
    meta, sizes = model.meta, model.sizes
    if sizes.head_dim * sizes.num_heads != sizes.hidden_size:
        raise model.fault(
            "has heads of a size that Phi3ForCausalLM cannot have",
            found=sizes.head_dim,
            expected=f"hidden size / heads = {sizes.hidden_size / sizes.num_heads:g}",
        )
    dim = meta.integer(meta.hyper("rope.dimension_count"), sizes.head_dim)
    rope = rope_parameters(model.file, meta, dim=dim)
    if rope["rope_type"] not in {"default", "longrope"}:
        raise model.fault(
            "has a rope scaling that Phi3ForCausalLM cannot have", expected="none or longrope", found=rope["rope_type"]
        )
    context = meta.integer(meta.hyper("context_length"))
    return {
        "hidden_act": "silu",
        "sliding_window": meta.integer(meta.hyper("attention.sliding_window"), 0) or None,
        "original_max_position_embeddings": meta.integer(meta.hyper("rope.scaling.original_context_length"), context),
        "rope_parameters": rope | {"partial_rotary_factor": dim / sizes.head_dim},
    }


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", Naming(LLAMA_NORMS, interleaved=True), _llama),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", Naming(LLAMA_NORMS), _qwen2),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", Naming(LLAMA_NORMS, head_norms=True), _qwen3),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", Naming(GEMMA_NORMS, shifted_norms=True), _gemma2, gemma_order=True),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        Naming(GEMMA_NORMS, head_norms=True, shifted_norms=True),
        _gemma3,
        gemma_order=True,
    ),
    "phi3": Family("phi3", "Phi3ForCausalLM", Naming(LLAMA_NORMS, fused=True), _phi3),
}
"""By llama.cpp's architecture name; llama covers Mistral too, whose tensors and arithmetic are the same."""
