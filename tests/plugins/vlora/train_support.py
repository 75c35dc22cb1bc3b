"""Image-text data with precomputed features, and one call of `vlora-train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.vlora.train import VloraTrain
from regraft.plugins.vlora.train_params import VloraTrainParams

NEW = {"dim": 32, "depth": 1, "heads": 4, "rank": 4, "types": "qkvom", "every": 1, "separate": False}
WORDS = ("red", "green", "blue")


def write_features(path: Path) -> Path:
    """Of three colours, [2 patches, 6]: large, as those of an encoder are."""
    save_file({word: 8 * torch.eye(6)[2 * number : 2 * number + 2].clone() for number, word in enumerate(WORDS)}, path)
    return path


def make_tower(folder: Path) -> Path:
    """A CLIP vision tower of random weights: 4 patches of width 8 of an image of 8 by 8."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def draw(folder: Path) -> None:
    """A picture of each colour."""
    from PIL import Image

    for word in WORDS:
        Image.new("RGB", (8, 8), word).save(folder / f"{word}.png")


def rows(*, text: bool = True) -> list[dict[str, str]]:
    """One question about each colour, and one that needs no picture."""
    seen = [{"prompt": "colour?", "answer": word, "features": word} for word in WORDS]
    return [*seen, {"prompt": "1+1=", "answer": "2"}] if text else seen


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def params(folder: Path, **values: Any) -> VloraTrainParams:
    """Quick by default: four steps in fp32 at a high rate."""
    given = {"data": folder / "rows.jsonl", "features": folder / "features.safetensors", "lr": 1e-2, "epochs": 4,
             "batch_size": 4, "micro_batch": 4, "warmup": 0.0, **values}  # fmt: skip
    if "generator" not in given and "new" not in given:
        given["new"] = NEW
    given = {key: value for key, value in given.items() if value is not None}
    given["learning"] = {"precision": "float32", **given.get("learning", {})}
    return VloraTrainParams.model_validate_json(json.dumps(given, default=str), strict=True)


def learn(checkpoint: Any, given: VloraTrainParams, **run: Any):
    """Check, plan and apply; the patch keeps the plan's word. Gives the patch and the result."""
    checkpoint = open_checkpoint(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    step = VloraTrain()
    step.check(checkpoint, given)
    outline = step.plan(checkpoint, given)
    patch = step.apply(checkpoint, given, Run("see", **run))
    assert outline.deviations(patch) == []
    return patch, overlay(checkpoint, patch, by="see")


def loaded(checkpoint: Any) -> dict[str, Any]:
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
