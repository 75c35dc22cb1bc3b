"""Vision encoders (CLIP, SigLIP): an image's patches as features, from one hidden state of the vision tower.

Opening an encoder reads its config and headers; torch and transformers come with `load`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import InputError, RegraftError, Unsupported, first_line
from regraft.core.sources.open import open_checkpoint
from regraft.core.specs import FLOAT_CODES
from regraft.core.tensors import LazyTensor
from regraft.plugins.vlora.images import check_image, read_image

if TYPE_CHECKING:
    import torch

__all__ = ["Encoder", "Tower", "check_image", "open_tower", "read_image"]

PROCESSOR = "preprocessor_config.json"

_KINDS = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModel"),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModel"),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
    "siglip_vision_model": ("SiglipVisionConfig", "SiglipVisionModel"),
}
_LONE = {kind: f"{kind.removesuffix('_vision_model')}_vision_model" for kind in _KINDS}
_NESTED = "vision_config"
_PREFIX = "vision_model."
"""Before the tower's tensors in checkpoints of both towers, and in what earlier releases of transformers wrote."""
_BUFFER = "embeddings.position_ids"
"""What earlier releases of transformers wrote beside the weights: 0, 1, 2, ..."""
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.layer_norm1\.weight")
_FP32 = 4
_SIDE = 64


@dataclass(frozen=True)
class Tower:
    """An opened encoder.

    Args:
        checkpoint: its checkpoint; a text tower beside it is not read.
        select_layer: which hidden state the features are: -1 the last, -2 the last but one, 0 the embeddings.
        patches: features of an image.
        width: of a feature.
        num_layers: of the tower.
        leading: positions before the patches, which are dropped: 1 for CLIP's class token.
        nbytes: of its weights in fp32.
    """

    checkpoint: Checkpoint
    select_layer: int
    patches: int
    width: int
    num_layers: int
    leading: int
    nbytes: int

    @property
    def label(self) -> str:
        """As the user wrote it."""
        return self.checkpoint.label

    @property
    def kind(self) -> str:
        """`model_type` of the vision tower alone."""
        return _LONE[self.checkpoint.config["model_type"]]

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the vision tower."""
        return self.checkpoint.config.get(_NESTED) or self.checkpoint.config

    @property
    def weights(self) -> dict[str, LazyTensor]:
        """The tower's weights by name, without prefix."""
        return {name: self.checkpoint.tensors[stored] for name, stored in _own(self.checkpoint).items()}

    def sha256(self) -> str:
        """Over config, names and values of the weights; reads them all."""
        import torch

        hasher = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(self.weights.items()):
            hasher.update(json.dumps([name, tensor.spec.dtype, list(tensor.spec.shape)]).encode())
            hasher.update(tensor.load().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return hasher.hexdigest()

    def load(self, device: str = "cpu") -> Encoder:
        """The tower with its weights in fp32, and the image processor beside it.

        Raises:
            InputError: the weights do not fit the class, or there is no processor that transformers reads.
        """
        from regraft.core.training.model import memory, quiet, side_folder

        with side_folder(self.checkpoint) as folder, quiet():
            processor = _processor(self.checkpoint, folder)
            with memory("loading the vision encoder"):
                model = _model(self).to(device)
        return Encoder(self, model, processor)

    def rehearse(self) -> None:
        """Look at a grey picture by shapes alone: whether weights, config and processor fit together. Reads no weight.

        Raises:
            InputError: they do not, or there are weights that the class does not know.
        """
        from PIL import Image

        from regraft.core.training.model import quiet, side_folder

        with side_folder(self.checkpoint) as folder, quiet():
            processor = _processor(self.checkpoint, folder)
            with _building(self):
                model = _empty(self)
        known = set(_stored(self, model).values())
        for name, stored in _own(self.checkpoint).items():
            if stored not in known:
                raise _unfitting(self, name, "no such tensor", self.checkpoint.specs[stored])
        Encoder(self, model, processor).hidden_states([Image.new("RGB", (_SIDE, _SIDE), "gray")])


@dataclass(frozen=True)
class Encoder:
    """A loaded encoder: call it with the path of an image.

    Args:
        tower: what it was loaded from.
        model: of transformers, in eval mode.
        processor: image to pixels.
    """

    tower: Tower
    model: Any
    processor: Any

    def __call__(self, path: Path) -> torch.Tensor:
        """Features [patches, width] of one image, fp32, on the model's device. Raises as `read_image` and `see`."""
        return self.see([read_image(path)])[0]

    def see(self, images: list[Any]) -> torch.Tensor:
        """Features [N, patches, width] of N RGB images.

        Raises:
            InputError: as `hidden_states`, or features are not finite.
        """
        features: torch.Tensor = self.hidden_states(images)[self.tower.select_layer][:, self.tower.leading :]
        if not features.isfinite().all():
            raise InputError("the encoder's features are NaN or infinite", where=self.tower.label,
                             remedy="its weights are damaged: fetch it again")  # fmt: skip
        return features

    def hidden_states(self, images: list[Any]) -> Any:
        """The embeddings of N RGB images, and the output of each layer.

        Raises:
            InputError: the processor makes pixels that the encoder does not take.
        """
        import torch

        try:
            pixels = self.processor(images, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                return self.model(pixels.to(self.model.device), output_hidden_states=True).hidden_states
        except (ValueError, RuntimeError) as error:
            raise InputError(
                "the image processor does not fit the encoder", where=f"{self.tower.label}: {PROCESSOR}",
                found=first_line(error), remedy="take both from one checkpoint",
            ) from None  # fmt: skip


def open_tower(reference: str, *, select_layer: int = -2) -> Tower:
    """The encoder in a folder, or under a hub id.

    Args:
        reference: a CLIP or SigLIP checkpoint, whole or its vision tower alone.
        select_layer: index of the hidden state; hidden states are the embeddings, then the output of each layer.

    Raises:
        InputError: there is none, or its headers are not valid; pickled weights; no such hidden state.
        Unsupported: an encoder of another kind.
    """
    checkpoint = open_checkpoint(reference)
    kind = checkpoint.config.get("model_type")
    if kind not in _KINDS:
        raise Unsupported("is no vision encoder that regraft runs", where=f"{checkpoint.label}: {CONFIG}: model_type",
                          expected=", ".join(_KINDS), found=kind,
                          remedy="compute the features yourself, and give them as `features`")  # fmt: skip
    shapes = {name.removeprefix(_PREFIX): spec.shape for name, spec in checkpoint.specs.items()}
    patches = shapes.get("embeddings.patch_embedding.weight", ())
    positions = shapes.get("embeddings.position_embedding.weight", ())
    layers = sum(_LAYER.fullmatch(name) is not None for name in shapes)
    if len(patches) != 4 or len(positions) != 2 or not layers:
        raise InputError("has no vision tower", where=checkpoint.label,
                         expected="embeddings.patch_embedding, embeddings.position_embedding, encoder.layers",
                         remedy="name the whole CLIP or SigLIP checkpoint, or its vision tower")  # fmt: skip
    if not -layers - 1 <= select_layer <= layers:
        raise InputError("the encoder has no such hidden state", where=f"{checkpoint.label}: select_layer",
                         expected=f"{-layers - 1} to {layers}", found=select_layer,
                         remedy="use the encoder that the generator was trained with")  # fmt: skip
    leading = 1 if kind.startswith("clip") else 0
    tower = _own(checkpoint)
    nbytes = _FP32 * sum(checkpoint.specs[name].numel for name in tower.values())
    return Tower(checkpoint, select_layer, positions[0] - leading, patches[0], layers, leading, nbytes)


def _own(checkpoint: Checkpoint) -> dict[str, str]:
    """The tower's tensors: names without prefix, and as stored."""
    inside = {name.removeprefix(_PREFIX): name for name in checkpoint.specs if name.startswith(_PREFIX)}
    own = inside or {name: name for name in checkpoint.specs}
    return {name: stored for name, stored in own.items() if name != _BUFFER}


def _model(tower: Tower) -> Any:
    import torch

    with _building(tower):
        wanted = _empty(tower)
        state = {name: tower.checkpoint.load(stored).float() for name, stored in _stored(tower, wanted).items()}
        model = type(wanted).from_pretrained(None, config=wanted.config, state_dict=state, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def _empty(tower: Tower) -> Any:
    """The model on the meta device, without values."""
    import torch
    import transformers

    config_class, model_class = (getattr(transformers, name) for name in _KINDS[tower.checkpoint.config["model_type"]])
    with torch.device("meta"):
        return model_class(config_class.from_dict(dict(tower.config))).eval()


@contextmanager
def _building(tower: Tower) -> Iterator[None]:
    import torch

    try:
        yield
    except (RegraftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises what it likes here
        raise InputError("transformers does not build the vision encoder", where=f"{tower.label}: {CONFIG}",
                         found=first_line(error), remedy="fetch the encoder again") from None  # fmt: skip


def _stored(tower: Tower, model: Any) -> dict[str, str]:
    """The weights that the class wants, under its own names, which differ between releases of transformers, and as they
    are stored."""
    own, specs = _own(tower.checkpoint), tower.checkpoint.specs
    found: dict[str, str] = {}
    for name, expected in model.state_dict().items():
        stored = own.get(name.removeprefix(_PREFIX), "")
        spec = specs.get(stored)
        if spec is None or spec.shape != tuple(expected.shape) or spec.dtype not in FLOAT_CODES:
            raise _unfitting(tower, name, list(expected.shape), spec or "no such tensor")
        found[name] = stored
    return found


def _unfitting(tower: Tower, name: str, expected: object, found: object) -> InputError:
    return InputError("the vision encoder's weights do not fit its config", where=f"{tower.label}: {name}",
                      expected=expected, found=found, remedy="fetch the encoder again")  # fmt: skip


def _processor(checkpoint: Checkpoint, folder: Path) -> Any:
    from transformers import AutoImageProcessor

    where = f"{checkpoint.label}: {PROCESSOR}"
    if PROCESSOR not in checkpoint.files:
        raise InputError("the vision encoder has no image processor", where=where, expected=PROCESSOR,
                         remedy="put that of the encoder beside its weights")  # fmt: skip
    try:
        # of the two that transformers has, the one that is always there: the same pixels with and without torchvision
        return AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes here
        raise InputError("transformers does not read the image processor", where=where,
                         found=first_line(error),
                         remedy="fetch the encoder again") from None  # fmt: skip
