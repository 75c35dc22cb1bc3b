"""What the generator sees: features of images, from a vision encoder or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regraft.core.errors import InputError, UsageError
from regraft.core.specs import FLOAT_CODES
from regraft.core.tensors import FileTensor, WeightFile
from regraft.plugins.vlora.images import check_image
from regraft.plugins.vlora.params import VloraParams
from regraft.plugins.vlora.settings import GeneratorSettings
from regraft.plugins.vlora.vision import Tower, open_tower

if TYPE_CHECKING:
    import torch

_SHOWN = 5


@dataclass(frozen=True)
class Sight:
    """The images of a step, known from headers.

    Args:
        names: what messages and records call them: names of files or of tensors.
        images: files; empty where features are given.
        tower: the encoder that looks at them.
        features: tensors [P, dv], or [1, P, dv]; empty where images are given.
    """

    names: tuple[str, ...]
    images: tuple[Path, ...] = ()
    tower: Tower | None = None
    features: tuple[FileTensor, ...] = ()

    @property
    def workspace_bytes(self) -> int:
        """Host memory of the encoder."""
        return 0 if self.tower is None else self.tower.nbytes

    def look(self, device: str) -> torch.Tensor:
        """Features [N, P, dv] of N images, fp32.

        Raises:
            InputError: an image cannot be decoded, or features are NaN or infinite.
        """
        import torch

        if self.tower is None:
            return torch.stack([_values(name, tensor, device) for name, tensor in zip(
                self.names, self.features, strict=True)])  # fmt: skip
        encoder = self.tower.load(device)
        # one by one: an image's features do not depend on its company
        return torch.stack([encoder(image) for image in self.images])


def sight_of(params: VloraParams, settings: GeneratorSettings) -> Sight:
    """What there is to see; reads headers of images, encoder and features.

    Raises:
        InputError: an image, the encoder or the file of features is not valid, or does not fit the generator.
        UsageError: no encoder is known, or it is not said which features.
        Unsupported: an encoder of another kind.
    """
    if params.features is not None:
        return _from_file(params.features, params.names, settings)
    for image in params.pictures:
        check_image(image)
    tower = _fitting(_tower(params, settings), settings)
    return Sight(tuple(image.name for image in params.pictures), params.pictures, tower)


def eyes_of(params: VloraParams, settings: GeneratorSettings) -> Tower | None:
    """The encoder that an attached generator sees with; None where neither the recipe nor the generator names one.

    Raises:
        InputError, Unsupported: as `sight_of`.
    """
    if params.vision is None and settings.vision_tower is None:
        return None
    return _fitting(_tower(params, settings), settings)


def looks_by_itself(params: VloraParams, settings: GeneratorSettings) -> bool:
    """Whether pictures are seen by an encoder that the generator names and the recipe does not."""
    return params.features is None and params.vision is None and settings.vision_tower is not None


def _fitting(tower: Tower, settings: GeneratorSettings) -> Tower:
    found, wanted = (tower.patches, tower.width), (settings.pos_num, settings.visual_dim)
    if found != wanted:
        raise InputError(
            "the vision encoder is not that of the generator", where=tower.label,
            expected=f"{wanted[0]} features of width {wanted[1]}", found=f"{found[0]} features of width {found[1]}",
            remedy=_encoder_remedy(settings),
        )  # fmt: skip
    return tower


def _tower(params: VloraParams, settings: GeneratorSettings) -> Tower:
    if params.vision is not None:
        return open_tower(params.vision, select_layer=settings.select_layer)
    if settings.vision_tower is None:
        raise UsageError("the generator does not say which vision encoder it was trained with", where="vision",
                         remedy="name it: vision = \"...\", or give `features`")  # fmt: skip
    try:
        return open_tower(settings.vision_tower, select_layer=settings.select_layer)
    except InputError as error:
        raise InputError(
            f"the generator's vision encoder cannot be opened: {error.message}", where=error.where,
            expected=error.expected, found=error.found, remedy='name the encoder with vision = "..."',
        ) from None  # fmt: skip


def _from_file(path: Path, names: Sequence[str] | None, settings: GeneratorSettings) -> Sight:
    if not path.is_file():
        raise InputError("there is no such file of features", where=path, expected="a .safetensors file",
                         remedy="check the path, which starts at the recipe's folder")  # fmt: skip
    tensors = WeightFile(path).tensors()
    shown = ", ".join(list(tensors)[:_SHOWN]) + (", ..." if len(tensors) > _SHOWN else "")
    if names is None and len(tensors) != 1:
        raise UsageError("the file does not hold the features of one image", where=path, expected="one tensor",
                         found=f"{len(tensors)}: {shown}" if tensors else "none",
                         remedy="say which with `names`")  # fmt: skip
    chosen = tuple(names or tensors)
    for name in chosen:
        if name not in tensors:
            raise InputError("the file has no such features", where=f"{path}: {name}", expected=f"one of {shown}",
                             remedy="correct `names`")  # fmt: skip
        _check(path, tensors[name], settings)
    return Sight(chosen, features=tuple(tensors[name] for name in chosen))


def _check(path: Path, tensor: FileTensor, settings: GeneratorSettings) -> None:
    shape, wanted = tensor.spec.shape, (settings.pos_num, settings.visual_dim)
    if tensor.spec.dtype not in FLOAT_CODES:
        raise InputError("features are no float tensor", where=f"{path}: {tensor.spec.name}",
                         expected=", ".join(sorted(FLOAT_CODES)), found=tensor.spec.dtype,
                         remedy="save them unquantised")  # fmt: skip
    if shape not in (wanted, (1, *wanted)):
        raise InputError(
            "the features are not those that the generator reads", where=f"{path}: {tensor.spec.name}",
            expected=f"{list(wanted)}: features of an image, width of a feature", found=list(shape),
            remedy=_encoder_remedy(settings),
        )  # fmt: skip


def _encoder_remedy(settings: GeneratorSettings) -> str:
    known = f": {settings.vision_tower}" if settings.vision_tower else ""
    return f"use the encoder that the generator was trained with{known}, its hidden state {settings.select_layer}"


def _values(name: str, tensor: FileTensor, device: str) -> torch.Tensor:
    import torch

    values = tensor.load(device).float().reshape(tensor.spec.shape[-2:])
    if not torch.isfinite(values).all():
        raise InputError("features are NaN or infinite", where=f"{tensor.file.path}: {name}",
                         remedy="compute them again")  # fmt: skip
    return values
