"""config.json and generation_config.json from the metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

from regraft.core.gguf.families import Family, Model
from regraft.core.gguf.metadata import Metadata
from regraft.core.gguf.names import Sizes, tied
from regraft.core.gguf.reader import GgufHeader
from regraft.core.jsonio import brief

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "attention.scale": (0.0,),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
}
"""Hyperparameters that no supported class has, with the values at which that does not matter."""

_NOT_ARITHMETIC = ("tensor_data_layout", "attention.layer_norm_epsilon", "attention.sliding_window_pattern")

_SPECIAL = {
    "bos_token_id": ("bos", 1),
    "eos_token_id": ("eos", 2),
    "pad_token_id": ("padding", None),
    "unk_token_id": ("unknown", 0),
}


def sizes_of(header: GgufHeader, meta: Metadata) -> Sizes:
    """The sizes of the model.

    Raises:
        InputError: missing or impossible.
    """
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise meta.fault(
            "token_embd.weight",
            "the file holds no embedding",
            expected="a matrix",
            found="nothing" if embedding is None else list(embedding.shape),
            remedy="name the file of a whole text model, not of a part, an adapter or a vocabulary",
        )
    hidden, layers, heads = (
        _positive(meta, name) for name in ("embedding_length", "block_count", "attention.head_count")
    )
    if layers > len(header.tensors):
        raise meta.fault(
            meta.hyper("block_count"),
            "announces more layers than the file holds",
            expected=f"fewer than {len(header.tensors)}",
            found=layers,
        )
    kv_heads = meta.integer(meta.hyper("attention.head_count_kv"), heads)
    head_dim = meta.integer(meta.hyper("attention.key_length"), hidden // heads)
    if not kv_heads or heads % kv_heads or head_dim == 0 or head_dim % 2:
        raise meta.fault(
            meta.hyper("attention.head_count_kv"),
            "the heads do not fit together",
            expected="heads in equal groups, of an even size",
            found=f"{heads} heads, {kv_heads} key-value heads, size {head_dim}",
        )
    if (width := meta.integer(meta.hyper("attention.value_length"), head_dim)) != head_dim:
        raise meta.fault(
            meta.hyper("attention.value_length"),
            "differs from the size of the keys, which no supported class can have",
            expected=head_dim,
            found=width,
        )
    rows = embedding.shape[0]
    if (announced := meta.integer(meta.hyper("vocab_size"), rows)) != rows:
        raise meta.fault(
            meta.hyper("vocab_size"), "contradicts the embedding", expected=f"{rows} rows", found=announced
        )
    return Sizes(rows, hidden, _positive(meta, "feed_forward_length"), layers, heads, kv_heads, head_dim)


def build_config(model: Model, family: Family, special: dict[str, int | None]) -> dict[str, Any]:
    """The config under which stock transformers builds this model.

    Args:
        model: the file with its metadata and sizes.
        family: of its architecture.
        special: ids of the special tokens, from `special_ids`.

    Raises:
        InputError: the metadata says something that the stock class cannot express, or that regraft does not know.
    """
    meta, sizes = model.meta, model.sizes
    config = {
        "architectures": [family.class_name],
        "model_type": family.model_type,
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "max_position_embeddings": _positive(meta, "context_length"),
        "rms_norm_eps": meta.number(meta.hyper("attention.layer_norm_rms_epsilon")),
        **family.extra(model),
        "tie_word_embeddings": tied(model.file.header),
        "bos_token_id": special["bos_token_id"],
        "eos_token_id": special["eos_token_id"],
        "pad_token_id": special["pad_token_id"],
        "use_cache": True,
        "dtype": "float32",
    }
    _check_nothing_dropped(meta)
    return config


def special_ids(meta: Metadata, vocab_size: int) -> dict[str, int | None]:
    """Ids of the bos, eos, pad and unk tokens; SentencePiece vocabularies have llama.cpp's defaults.

    Raises:
        InputError: an id outside the vocabulary.
    """
    spm = meta.text("tokenizer.ggml.model", "none") == "llama"
    return {
        name: token_id(meta, short, vocab_size, default if spm else None) for name, (short, default) in _SPECIAL.items()
    }


def token_id(meta: Metadata, short: str, vocab_size: int, default: int | None = None) -> int | None:
    """The id under `tokenizer.ggml.{short}_token_id`; None if there is none.

    Raises:
        InputError: outside the vocabulary.
    """
    key = f"tokenizer.ggml.{short}_token_id"
    if not meta.has(key):
        return default
    value = meta.integer(key)
    if value >= vocab_size:
        raise meta.fault(key, "is outside the vocabulary", expected=f"below {vocab_size}", found=value)
    return value


def build_generation_config(meta: Metadata, vocab_size: int, special: dict[str, int | None]) -> dict[str, Any]:
    """Where generation begins and ends: at eos, and at the ends of turn and of message where the file names them."""
    ends = [special["eos_token_id"], token_id(meta, "eot", vocab_size), token_id(meta, "eom", vocab_size)]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    ids = {
        "bos_token_id": special["bos_token_id"],
        "eos_token_id": unique if len(unique) > 1 else special["eos_token_id"],
        "pad_token_id": special["pad_token_id"],
    }
    return {key: value for key, value in ids.items() if value is not None}


def _positive(meta: Metadata, name: str) -> int:
    value = meta.integer(meta.hyper(name))
    if value == 0:
        raise meta.fault(meta.hyper(name), "is zero", expected="a positive number", found=0)
    return value


def _check_nothing_dropped(meta: Metadata) -> None:
    meta.ignore(meta.hyper(name) for name in _NOT_ARITHMETIC)
    for name, neutral in _NEUTRAL.items():
        key = meta.hyper(name)
        if meta.has(key) and meta.values[key] not in neutral:
            raise meta.fault(
                key,
                "is something that the stock class does not have",
                expected=f"no such key, or {neutral[0]}",
                found=brief(meta.values[key]),
                remedy="start from the original safetensors checkpoint",
            )
    if unknown := meta.unasked(meta.hyper("")):
        raise meta.fault(
            unknown[0],
            "is a hyperparameter that regraft does not know, and leaving it out might change the model",
            found=brief(meta.values[unknown[0]]),
            remedy="start from the original safetensors checkpoint",
        )
