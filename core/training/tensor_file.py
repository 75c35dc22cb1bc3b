"""Small safetensors files of our own: written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from regraft.core.errors import InputError


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file and flush it, under another name first: a killed process leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # safetensors refuses tensors that share memory, as tied weights and lookup tables do
    save_file({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}, part, dict(metadata or {}))
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError("a file of the training is damaged", where=path, found=error, remedy="delete it") from None
