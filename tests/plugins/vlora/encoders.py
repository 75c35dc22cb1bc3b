"""Tiny vision encoders of every kind, and image files."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

VISION = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 4}  # fmt: skip
TEXT = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30,
        "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def save_encoder(kind: str, folder: Path, *, prefixed: bool = False, **changes):
    """Write a tiny encoder; gives its vision tower.

    Args:
        kind: `clip`, `clip-vision`, `siglip` or `siglip-vision`; 4 patches of width 12.
        prefixed: name the tensors of a lone tower as earlier releases of transformers did.
        changes: of the vision config.
    """
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipConfig,
        SiglipModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    vision = {**VISION, **changes}
    torch.manual_seed(0)
    model = {
        "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision)),
        "clip-vision": lambda: CLIPVisionModel(CLIPVisionConfig(**vision)),
        "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=vision)),
        "siglip-vision": lambda: SiglipVisionModel(SiglipVisionConfig(**vision)),
    }[kind]().eval()
    model.save_pretrained(folder)
    side = vision["image_size"]
    if kind.startswith("clip"):
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    else:
        processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    processor.save_pretrained(folder)
    if prefixed:
        weights = folder / "model.safetensors"
        save_file({f"vision_model.{name}": one for name, one in load_file(weights).items()}, weights)
    return getattr(model, "vision_model", model)


def picture(path: Path, size=(20, 14), seed=0, **options) -> Path:
    """A picture of coloured noise."""
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=random)
    Image.fromarray(pixels.numpy()).save(path, **options)
    return path
