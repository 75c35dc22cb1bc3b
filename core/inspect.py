"""What a checkpoint is, from headers and config alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import RegraftError

_SIZES = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


def describe(checkpoint: Checkpoint, families: Sequence[Any] = ()) -> dict[str, Any]:
    """Facts about `checkpoint` as a JSON object: source, model type, sizes, parameters, dtypes, files.

    Args:
        checkpoint: what is described.
        families: rows of plugins for `architecture_of`.
    """
    specs = checkpoint.specs.values()
    return {
        "checkpoint": checkpoint.label,
        "origin": dict(checkpoint.origin),
        "model_type": checkpoint.config.get("model_type"),
        "architectures": checkpoint.config.get("architectures"),
        "sizes": _sizes(checkpoint, families),
        "rope": _rope(checkpoint.config),
        "max_position_embeddings": checkpoint.config.get("max_position_embeddings"),
        "parameters": sum(spec.numel for spec in specs),
        "bytes": sum(spec.nbytes for spec in specs),
        "tensors": len(checkpoint.specs),
        "dtypes": dict(Counter(spec.dtype for spec in specs)),
        "weight_files": sorted(set(checkpoint.shards.values())),
        "files": {name: file.nbytes for name, file in checkpoint.files.items()},
        "not_carried": dict(checkpoint.left_behind),
        "notes": list(checkpoint.notes),
        "digest": checkpoint.digest,
    }


def describe_tensors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Name, dtype, shape and file of every tensor, in order."""
    return [
        {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "file": checkpoint.shards.get(spec.name)}
        for spec in checkpoint.specs.values()
    ]


def _sizes(checkpoint: Checkpoint, families: Sequence[Any]) -> Mapping[str, Any]:
    try:
        architecture = architecture_of(checkpoint.config, checkpoint.specs, families=families, derive=False)
    except RegraftError:
        return {}
    return {name: getattr(architecture, name) for name in _SIZES}


def _rope(config: Mapping[str, Any]) -> Any:
    old = {"rope_theta": config.get("rope_theta"), "rope_scaling": config.get("rope_scaling")}
    return config.get("rope_parameters") or {key: value for key, value in old.items() if value is not None} or None
