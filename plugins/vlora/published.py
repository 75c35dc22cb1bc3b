"""The published checkpoints' layout: `model.mm_projector.` beside the language model's tensors, one width for all.

FeipengMa6/VLoRA saves sub-generators under numbers in the order of `vlora_type`, and the B of all types in one tensor
(1, types · active layers, width · rank). Seen under our names; nothing is copied before it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, RowReader
from regraft.plugins.vlora.settings import SHARED, GeneratorSettings

PREFIX = "model.mm_projector."
PUBLISHED_KEY = "vlora_dim"

_KEYS = {
    "dim": PUBLISHED_KEY, "depth": "vlora_depth", "visual_dim": "vlora_visual_dim", "pos_num": "vlora_pos_num",
    "rank": "vlora_rank", "types": "vlora_type", "weights_sep": "weights_sep", "skip_layers": "skip_layers",
    "num_layers": "vlora_llm_depth",
}  # fmt: skip
_WIDTH = "vlora_llm_dim"


class Reshaped(LazyTensor):
    """A stored tensor, or some entries along its second dimension, under another name and in another shape.

    Args:
        name, shape: as it is seen; row-major, as stored.
        tensor: as stored.
        part: which entries of the second dimension; None takes everything.
    """

    def __init__(self, name: str, shape: tuple[int, ...], tensor: LazyTensor, part: slice | None = None) -> None:
        self.spec = replace(tensor.spec, name=name, shape=shape)
        self.tensor = tensor
        self.sources = (tensor,)
        self._part = part

    @property
    def row_local(self) -> bool:
        """Rows of it are no rows of the stored tensor."""
        return False

    @property
    def held_bytes(self) -> int:
        """The stored tensor and the part."""
        return self.tensor.spec.nbytes + self.spec.nbytes

    def open(self, device: str = "cpu") -> RowReader:
        """Reads the whole stored tensor."""
        stored = self.tensor.load(device)
        values = (stored if self._part is None else stored[:, self._part]).reshape(self.spec.shape)
        return lambda start, stop: values[start:stop]


def published_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our configuration from the keys of the published checkpoint's config.json.

    Raises:
        InputError: a key is missing; the training code's own defaults are those of no published model.
    """
    if missing := [key for key in (*_KEYS.values(), _WIDTH) if key not in config]:
        raise InputError("the config of a published generator lacks keys", where=where, expected=", ".join(missing),
                         remedy="add what the generator was trained with")  # fmt: skip
    types, width = config["vlora_type"], config[_WIDTH]
    sizes = dict.fromkeys(types, width) if isinstance(types, str) else {}
    return {
        **{ours: config[theirs] for ours, theirs in _KEYS.items()},
        "alpha": config.get("vlora_alpha"),
        "inputs": sizes,
        "outputs": sizes,
        "vision_tower": config.get("mm_vision_tower"),
        "select_layer": config.get("mm_vision_select_layer", -2),
    }


def published_tensors(checkpoint: Checkpoint, settings: GeneratorSettings) -> dict[str, LazyTensor]:
    """The generator's tensors under our names; whatever else stands beside them is not looked at.

    Raises:
        InputError: one is missing, or of another size.
    """
    found = dict(_renamed(checkpoint, settings))
    layers, rank = len(settings.active_layers), settings.rank
    bs, expected = (
        _stored(checkpoint, "Bs"),
        (1, layers * len(settings.types), settings.outputs[settings.types[0]] * rank),
    )
    if bs.spec.shape != expected:
        raise _wrong(checkpoint, bs.spec, expected)
    for slot, letter in enumerate(settings.types):
        part = slice(slot * layers, (slot + 1) * layers)
        shape = (layers, settings.outputs[letter], rank)
        found[f"B.{letter}"] = Reshaped(f"B.{letter}", shape, bs, part)
    return found


def _renamed(checkpoint: Checkpoint, settings: GeneratorSettings) -> Iterator[tuple[str, LazyTensor]]:
    for name, shape in settings.shapes().items():
        if name.startswith("B."):
            continue
        stored = _stored(checkpoint, published_name(name, settings.types))
        if stored.spec.shape != shape:
            raise _wrong(checkpoint, stored.spec, shape)
        yield name, Reshaped(name, shape, stored)


def published_name(name: str, types: str) -> str:
    """What the published code calls our tensor `name`, which is none of B."""
    if not name.startswith("gen."):
        return name
    _, group, rest = name.split(".", 2)
    rest = rest.replace("cross_attn.", "multihead_attn.")
    if rest.startswith("weights_head."):
        rest = f"weights_head.{rest.split('.')[-1]}"
    return f"gen.{rest}" if group == SHARED else f"gen.{types.index(group)}.{rest}"


def _stored(checkpoint: Checkpoint, name: str) -> LazyTensor:
    tensor = checkpoint.tensors.get(PREFIX + name)
    if tensor is None:
        raise InputError("the checkpoint lacks a tensor of the generator", where=f"{checkpoint.label}: {PREFIX}{name}",
                         expected="the generator's tensors beside the language model's",
                         remedy="name the published checkpoint with its mm_projector")  # fmt: skip
    return tensor


def _wrong(checkpoint: Checkpoint, spec: TensorSpec, expected: tuple[int, ...]) -> InputError:
    return InputError("a tensor of the generator has another shape than the config says",
                      where=f"{checkpoint.label}: {spec.name}", expected=list(expected), found=list(spec.shape),
                      remedy="fetch the checkpoint again")  # fmt: skip
