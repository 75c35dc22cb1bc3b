"""Writes a checkpoint, overlays included, by the plainest means: every tensor loaded, one safetensors file."""

from __future__ import annotations

from pathlib import Path

from regraft.core.checkpoint import Checkpoint


def materialise(checkpoint: Checkpoint, folder: Path | str) -> Path:
    """Write `checkpoint` into `folder`, which is created if missing."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.load().contiguous().clone() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, file in checkpoint.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.read())
    return folder
