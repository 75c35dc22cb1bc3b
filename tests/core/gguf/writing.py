"""GGUF files for tests: tiny transformers models written the way llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""llama.cpp's name where it is not the model_type."""

Change = Callable[[Any], None]
"""Called with the open gguf.GGUFWriter before the tensors are added: adds or replaces metadata."""


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of q_proj or k_proj as llama.cpp wants them: the two halves of each head interleaved."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape).contiguous()


def converted(name: str, tensor: torch.Tensor, config: Any, architecture: str) -> torch.Tensor:
    """What the converter makes of one tensor."""
    if architecture == "llama" and ".self_attn.q_proj." in name:
        return permuted(tensor, config.num_attention_heads)
    if architecture == "llama" and ".self_attn.k_proj." in name:
        return permuted(tensor, config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def write_model(path: Path, model: Any, encoding: str = "F32", *, change: Change | None = None, **options: Any) -> Path:
    """Write `model` with matrices in `encoding` and everything else in F32.

    Args:
        path: of the file.
        model: a transformers model.
        encoding: ggml's name.
        change: more metadata.
        options: `extra`, more tensors by GGUF name; `skip`, GGUF names to leave out; `data`, bytes by GGUF name.
    """
    import gguf

    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    add_sizes(writer, config)
    if change is not None:
        change(writer)
    names = gguf.get_tensor_name_map(_arch(architecture), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{suffix}"
        if stored in options.get("skip", ()):
            continue
        add_tensor(
            writer, stored, converted(name, tensor, config, architecture), encoding if tensor.ndim > 1 else "F32"
        )
    for name, tensor in options.get("extra", {}).items():
        add_tensor(writer, name, tensor, "F32")
    return finish(writer)


def add_sizes(writer: Any, config: Any) -> None:
    """The hyperparameters that every converter writes."""
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for name in ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name, None)
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])


def add_tensor(writer: Any, name: str, tensor: torch.Tensor, encoding: str) -> None:
    """Add one tensor, quantised."""
    import gguf

    kind = gguf.GGMLQuantizationType[encoding]
    values = tensor.detach().float().numpy()
    plain = {"F32": np.float32, "F16": np.float16}
    data = values.astype(plain[encoding]) if encoding in plain else gguf.quantize(values, kind)
    writer.add_tensor(name, data, raw_dtype=None if encoding in plain else kind)


def finish(writer: Any) -> Path:
    """Write the file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(next(iter(writer.fout)).name) if getattr(writer, "fout", None) else Path(writer.path)


def _arch(architecture: str) -> Any:
    import gguf

    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)


def metadata(**values: Any) -> Mapping[str, Any]:
    """Metadata of a vocabulary of the llama architecture, as the parser gives it; `__` in names stands for a dot."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    return {"general.architecture": "llama", "llama.context_length": 128, **given}
