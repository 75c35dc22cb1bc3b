"""LoRA adapter folders, written without peft."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_adapter(
    folder: Path | str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    rank: int = 2,
    modules: Sequence[str] = ("self_attn.q_proj",),
    layers: int = 2,
    dims: tuple[int, int] = (64, 64),
    **config: Any,
) -> Path:
    """Write an adapter for the tiny llama into `folder`, and return the folder.

    Args:
        folder: is made.
        shapes: shape of each tensor by name; by default A [rank, in] and B [out, rank] for `modules` of `layers`.
        rank: of the default tensors and of the config.
        modules: paths inside a layer.
        layers: how many.
        dims: (out, in) of the modules.
        config: keys of adapter_config.json beside the necessary ones.
    """
    import torch
    from safetensors.torch import save_file

    if shapes is None:
        prefix = "base_model.model.model.layers"
        shapes = {}
        for layer in range(layers):
            for module in modules:
                shapes[f"{prefix}.{layer}.{module}.lora_A.weight"] = (rank, dims[1])
                shapes[f"{prefix}.{layer}.{module}.lora_B.weight"] = (dims[0], rank)
    generator = torch.Generator().manual_seed(0)
    folder = Path(folder)
    folder.mkdir(parents=True)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "base_model_name_or_path": "tiny/llama", **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
