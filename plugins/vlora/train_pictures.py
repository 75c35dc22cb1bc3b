"""From pictures to features while a generator learns: tensors of a file, or what a frozen vision encoder sees."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.checkpoint import FileRef
from regraft.core.errors import InputError, UsageError
from regraft.core.specs import FLOAT_CODES
from regraft.core.tensors import FileTensor, WeightFile
from regraft.plugins.vlora.settings import GeneratorSettings
from regraft.plugins.vlora.train_data import Picture
from regraft.plugins.vlora.train_params import VloraTrainParams
from regraft.plugins.vlora.vision import Encoder, Tower, check_image, open_tower

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FeatureFile:
    """Precomputed features [patches, width] of many pictures, by name.

    Args:
        path: a .safetensors file.
    """

    path: Path

    @cached_property
    def tensors(self) -> Mapping[str, FileTensor]:
        """By name; the header is validated.

        Raises:
            InputError: the file cannot be read.
        """
        return WeightFile(self.path).tensors()

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return FileRef(path=self.path).sha256()

    @property
    def size(self) -> tuple[int, int]:
        """Patches and width of the first tensor.

        Raises:
            InputError: there is none.
        """
        for name in self.tensors:
            return self.size_of(name)
        raise InputError("holds no features", where=self.path, remedy="write the features of the images into it")

    def size_of(self, name: str) -> tuple[int, int]:
        """Patches and width of one tensor.

        Raises:
            InputError: there is none of this name, or it is no matrix of floats.
        """
        where = f"{self.path}: {name}"
        if name not in self.tensors:
            raise InputError("the file has no such features", where=where, expected=f"one of {len(self.tensors)} names")
        spec = self.tensors[name].spec
        shape = spec.shape[1:] if len(spec.shape) == 3 and spec.shape[0] == 1 else spec.shape
        if len(shape) != 2 or spec.dtype not in FLOAT_CODES:
            raise InputError("is no matrix of features", where=where, expected="floats [patches, width]", found=spec)
        return shape[0], shape[1]

    def load(self, name: str) -> torch.Tensor:
        """Features [patches, width], fp32, on the CPU."""
        return self.tensors[name].load().float().reshape(self.size_of(name))


@dataclass(frozen=True)
class Sight:
    """What a new generator is to read.

    Args:
        patches, width: of an image's features.
        tower: the vision encoder, as the recipe names it; None for precomputed features.
        select_layer: which of its hidden states.
    """

    patches: int
    width: int
    tower: str | None = None
    select_layer: int = -2


def sight_of(params: VloraTrainParams) -> Sight:
    """From the config of the vision encoder, or the file of features.

    Raises:
        InputError: it is not valid.
        Unsupported: an encoder of another kind.
        UsageError: the recipe names neither, or both, and they do not agree.
    """
    file = None if params.features is None else FeatureFile(params.features)
    select_layer = -2 if params.select_layer is None else params.select_layer
    if params.vision is None:
        if file is None:
            raise UsageError(
                "a new generator needs something to see with", where="vision",
                expected="the vision encoder, or a file of features", remedy='give vision = "...", or features = "..."',
            )  # fmt: skip
        return Sight(*file.size, select_layer=select_layer)
    tower = open_tower(params.vision, select_layer=select_layer)
    if file is not None and file.size != (tower.patches, tower.width):
        raise UsageError(
            "the vision encoder and the file of features give features of different sizes", where="features",
            expected=[tower.patches, tower.width], found=list(file.size),
            remedy="compute them by this encoder, or leave one of both out",
        )  # fmt: skip
    return Sight(tower.patches, tower.width, published_name(params.vision, tower), select_layer)


def published_name(reference: str, tower: Tower) -> str | None:
    """How a generator names its encoder to others: by its hub id; a folder of this machine has no name elsewhere."""
    return reference if tower.checkpoint.origin.get("source") == "hub" else None


def tower_for(params: VloraTrainParams, settings: GeneratorSettings) -> Tower | None:
    """The encoder whose features a generator reads; None where neither recipe nor generator names one.

    Raises:
        InputError: it is not valid.
        Unsupported: an encoder of another kind.
        UsageError: its features have other sizes.
    """
    reference = params.vision or settings.vision_tower
    if reference is None:
        return None
    tower = open_tower(
        reference, select_layer=settings.select_layer if params.select_layer is None else params.select_layer
    )
    if (tower.patches, tower.width) != (settings.pos_num, settings.visual_dim):
        raise UsageError(
            "the generator reads features of another size than this vision encoder gives", where=f"vision: {reference}",
            expected=f"{settings.pos_num} of width {settings.visual_dim}",
            found=f"{tower.patches} of width {tower.width}", remedy="name the encoder that it was trained with",
        )  # fmt: skip
    return tower


KEPT_BYTES = 1 << 30
"""Of features of images that stay in memory, so that another epoch need not look again."""


@dataclass
class Pictures:
    """The eyes of a training. Each image is looked at by itself, so that its features do not depend on its company.

    Args:
        params: name encoder and file.
        settings: of the generator.
        device: of the encoder, which is loaded when the first image comes.
    """

    params: VloraTrainParams
    settings: GeneratorSettings
    device: str
    _kept: dict[str, torch.Tensor] = field(default_factory=dict)
    _bytes: int = 0

    @cached_property
    def file(self) -> FeatureFile | None:
        """Precomputed features."""
        return None if self.params.features is None else FeatureFile(self.params.features)

    @cached_property
    def tower(self) -> Tower | None:
        """The vision encoder, opened."""
        return tower_for(self.params, self.settings)

    @cached_property
    def encoder(self) -> Encoder:
        """The vision encoder, loaded."""
        if self.tower is None:
            raise _blind("image", 'vision = "..."')
        return self.tower.load(self.device)

    def check(self, picture: Picture) -> str:
        """SHA-256 of what a row shows.

        Raises:
            InputError: it cannot be read, or has features of other sizes than the generator reads.
            UsageError: the recipe gives nothing to see it with.
        """
        if picture.image:
            if self.tower is None:
                raise _blind("image", 'vision = "..."')
            check_image(Path(picture.key))
            return FileRef(path=Path(picture.key)).sha256()
        if self.file is None:
            raise _blind("features", 'features = "....safetensors"')
        wanted, found = (self.settings.pos_num, self.settings.visual_dim), self.file.size_of(picture.key)
        if found != wanted:
            raise InputError(
                "the generator reads features of another size", where=f"{self.file.path}: {picture.key}",
                expected=list(wanted), found=list(found),
            )  # fmt: skip
        return hashlib.sha256(f"{self.file.sha256}/{picture.key}".encode()).hexdigest()

    def look(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """Features [M, patches, width] of M pictures, fp32, on the CPU.

        Raises:
            InputError: an image cannot be read, or features are not finite.
        """
        import torch

        return torch.stack([self._seen(picture) for picture in pictures])

    def _seen(self, picture: Picture) -> torch.Tensor:
        import torch

        if picture.image and picture.key in self._kept:
            return self._kept[picture.key]
        features: torch.Tensor
        if picture.image:
            features = self.encoder(Path(picture.key)).cpu()
        else:
            assert self.file is not None
            features = self.file.load(picture.key)
        if not torch.isfinite(features).all():
            raise InputError("features are NaN or infinite", where=picture.key, remedy="compute them again")
        if picture.image and self._bytes + features.nbytes <= KEPT_BYTES:
            self._kept[picture.key] = features
            self._bytes += features.nbytes
        return features


def _blind(key: str, remedy: str) -> UsageError:
    return UsageError(f"rows name `{key}`, and the step has nothing to see it with", where=key, remedy=f"give {remedy}")
