"""First-party steps that a transformation is composed with, and what they need for a given checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import UsageError
from regraft.core.testing.adapters import write_adapter


def neighbour(name: str, checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """The step `name` for `checkpoint`; files that it needs are written into `folder`.

    Raises:
        UsageError: there is no such neighbour.
    """
    if name not in NEIGHBOURS:
        raise UsageError("no such neighbour", where="neighbours", expected=" or ".join(NEIGHBOURS), found=name,
                         remedy="name one of these")  # fmt: skip
    return {"use": name, "id": "neighbour", **NEIGHBOURS[name](checkpoint, folder)}


def _lora_merge(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    slot = architecture_of(checkpoint.config, checkpoint.specs).slot("o_proj", 0)
    rows, columns = slot.shape[slot.row_axis], slot.shape[slot.column_axis or 0]
    stem = f"base_model.model.{slot.tensor.removesuffix('.weight')}"
    shapes = {f"{stem}.lora_A.weight": (2, columns), f"{stem}.lora_B.weight": (rows, 2)}
    return {"adapter": str(write_adapter(folder / "adapter", shapes, fan_in_fan_out=slot.transposed))}


def _context_extension(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    return {"method": "abf", "target_length": 4 * int(checkpoint.config.get("max_position_embeddings", 128))}


def _steer(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    size = architecture_of(checkpoint.config, checkpoint.specs).hidden_size
    vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
    save_file({"layers.0.mlp_out": 0.1 * vector}, folder / "vectors.safetensors")
    return {"vectors": str(folder / "vectors.safetensors")}


def _grow(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    return {"layers": int(checkpoint.config.get("num_hidden_layers", 2)) + 1}


def _prune(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    return {"score": "magnitude", "sparsity": 0.25}


def _tokenizer_retrofit(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    return {"vocabulary": "add-tokens", "add": ["<|think|>"]}


NEIGHBOURS: Mapping[str, Callable[[Checkpoint, Path], dict[str, Any]]] = MappingProxyType(
    {
        "context-extension": _context_extension,
        "grow": _grow,
        "lora-merge": _lora_merge,
        "prune": _prune,
        "steer": _steer,
        "tokenizer-retrofit": _tokenizer_retrofit,
    }
)
"""What makes the parameters of each."""
