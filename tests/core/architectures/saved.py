"""A live tiny model beside the checkpoint that transformers writes of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.architectures import Architecture, architecture_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Saved:
    """A live model, and what `save_pretrained` wrote of it."""

    model: "PreTrainedModel"
    config: dict[str, Any]
    tensors: "dict[str, torch.Tensor]"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.config, self.tensors)


def write(model: "PreTrainedModel", folder: Path) -> Saved:
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return Saved(model, config, load_file(folder / "model.safetensors"))
