"""The vision encoder inside a checkpoint whose generator is attached: its weights, its config, and a processor.

The weights keep their bytes. The processor is a stock one: `AutoProcessor` finds the encoder's image processor beside
the model's tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import InputError
from regraft.core.jsonio import dump
from regraft.core.tensors import LazyTensor
from regraft.plugins.vlora.vision import PROCESSOR, Tower

VISION = "vision."
"""Before the encoder's tensors, among those of the generator."""

WHOLE = "processor_config.json"
"""Where a checkpoint may keep another processor, which `AutoProcessor` would prefer."""

_PROCESSOR_CLASS = "VisionTextDualEncoderProcessor"
"""Of the stock classes the one that takes any image processor and any tokenizer, and does nothing of its own."""

_IMAGE_CLASSES = {"clip_vision_model": "CLIPImageProcessor", "siglip_vision_model": "SiglipImageProcessor"}
_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size",
    "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "vision_use_head",
)  # fmt: skip


def eye_tensors(tower: Tower) -> dict[str, LazyTensor]:
    """The encoder's weights, by their names beside the generator's."""
    return {VISION + name: tensor for name, tensor in tower.weights.items()}


def eye_settings(tower: Tower) -> dict[str, Any]:
    """What the checkpoint's code has to know of the encoder: sizes alone, no path or name of its origin."""
    sizes = {key: tower.config[key] for key in _SIZES if key in tower.config}
    return {"vision": {"model_type": tower.kind, **sizes}, "leading": tower.leading}


def processor_files(tower: Tower) -> dict[str, FileRef]:
    """The image processor's file, which says what to join it to.

    Raises:
        InputError: the encoder has none.
    """
    if PROCESSOR not in tower.checkpoint.files:
        raise InputError("the vision encoder has no image processor", where=f"{tower.label}: {PROCESSOR}",
                         expected=PROCESSOR, remedy="put that of the encoder beside its weights")  # fmt: skip
    settings = {key: value for key, value in tower.checkpoint.json(PROCESSOR).items() if key != "auto_map"}
    if not {"image_processor_type", "feature_extractor_type"} & set(settings):
        settings["image_processor_type"] = _IMAGE_CLASSES[tower.kind]
    return {PROCESSOR: FileRef(data=dump({**settings, "processor_class": _PROCESSOR_CLASS}))}


def replaced_files(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Files of the language model that would keep `AutoProcessor` from the new one."""
    return {WHOLE: "the output's processor is that of the vision encoder"} if WHOLE in checkpoint.files else {}
