"""Small checkpoints, written and read back without transformers; torch only where there are tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def write_checkpoint(
    folder: Path | str,
    tensors: Mapping[str, torch.Tensor],
    *,
    shards: int | Sequence[Sequence[str]] = 1,
    config: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write `tensors` as a checkpoint folder and return it.

    Args:
        folder: is made.
        tensors: by name, in the order of the files.
        shards: how many files of about as many tensors each, or the names of each file's tensors.
        config: config.json; a minimal one by default.
        files: side files by relative path.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for name, content in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    groups = _groups(list(tensors), shards)
    names = (
        [SINGLE]
        if isinstance(shards, int) and shards == 1
        else [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    )
    for name, group in zip(names, groups, strict=True):
        save_file({tensor: tensors[tensor].contiguous() for tensor in group}, folder / name, {"format": "pt"})
    if names != [SINGLE]:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index))
    return folder


def _groups(names: list[str], shards: int | Sequence[Sequence[str]]) -> list[list[str]]:
    if not isinstance(shards, int):
        return [list(group) for group in shards]
    step = max(1, -(-len(names) // shards))
    return [names[start : start + step] for start in range(0, len(names), step)] or [[]]


def read_tensors(folder: Path | str) -> dict[str, torch.Tensor]:
    """Every tensor of a written folder, as the reference library reads them."""
    from safetensors.torch import load_file

    return {
        name: tensor for path in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, so that NaN equals itself and 0.0 differs from -0.0."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def same_bits(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether both hold the same names, dtypes, shapes and bytes."""
    return set(one) == set(other) and all(
        tensor.dtype == other[name].dtype and tensor.shape == other[name].shape and bits(tensor) == bits(other[name])
        for name, tensor in one.items()
    )


def tree(folder: Path | str) -> dict[str, str]:
    """SHA-256 of every file below `folder`, hidden ones too, and the word `folder` for folders, by relative path."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }
