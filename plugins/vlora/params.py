"""Parameters of `vlora`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.recipe.references import ModelReference
from regraft.core.transformation import Params
from regraft.plugins.vlora.settings import TYPES


class VloraParams(Params):
    """Which image, and the generator that turns it into weights."""

    generator: Path | None = Field(
        None,
        description="Folder of the generator (config.json and safetensors), as vlora-train writes it, or a published "
        "checkpoint with `model.mm_projector.` tensors. Default: the one that an earlier step of this recipe left in "
        "the checkpoint.",
    )
    image: Path | None = Field(None, description="The image: PNG, JPEG, WebP, BMP, GIF, TIFF or PPM, one picture.")
    images: Annotated[tuple[Path, ...], Field(min_length=1)] | None = Field(
        None, description="Several images, whose deltas are summed. No generator is trained for that."
    )
    features: Path | None = Field(
        None,
        description="In place of images: a .safetensors file with features [patches, width] of the vision encoder.",
    )
    names: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="Which tensors of `features`. Default: the only one."
    )
    vision: ModelReference | None = Field(
        None,
        description="The vision encoder, CLIP or SigLIP: a folder or a hub id. Default: the one that the generator was "
        "trained with. attached: it goes into the checkpoint.",
    )
    types: str | None = Field(
        None,
        min_length=1,
        description=f"Which of the generator's deltas are applied, letters of {TYPES}: queries, keys, values, "
        "attention output, and a path beside the MLP. Default: all of them.",
    )
    scale: float = Field(
        1.0, allow_inf_nan=False, description="Multiplies every delta, beside the generator's own alpha / rank."
    )

    mlp_multiple: Annotated[int, Field(ge=1, le=1024)] = Field(
        64,
        description="Type m adds the rank's number of hidden units to every MLP, rounded up to a multiple of this by "
        "units that do nothing: kernels for quantised and for shared-out weights want round widths. 1 adds no more.",
    )
    output: Literal["adapter", "merged", "attached"] = Field(
        "adapter",
        description="What is written where [output] format does not say it. adapter: a PEFT adapter of the image's "
        "deltas, to stand beside the base. merged: a checkpoint with the deltas in its weights. attached: no image; a "
        "checkpoint with the generator and its vision encoder, and code that takes pixels at run time.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.output == "attached":
            own = ("generator", "vision", "types", "scale", "output")
            if stray := [name for name in type(self).model_fields if name in self.model_fields_set - set(own)]:
                raise ValueError(f"{stray[0]} is for an image that is baked in: attached sees images at run time")
            return self
        given = [name for name in ("image", "images", "features") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"give one of `image`, `images` and `features`, found {found}")
        if self.features is None and self.names is not None:
            raise ValueError("names is for `features`: remove it")
        if self.features is not None and self.vision is not None:
            raise ValueError("vision is for images: features come from an encoder already, so remove it")
        return self

    @model_validator(mode="after")
    def _known_types(self) -> Self:
        if self.types is not None and (not set(self.types) <= set(TYPES) or len(set(self.types)) < len(self.types)):
            raise ValueError(f"types: expected letters of {TYPES}, each once, found {self.types!r}")
        return self

    @property
    def pictures(self) -> tuple[Path, ...]:
        """The images; none where features are given."""
        return self.images or (() if self.image is None else (self.image,))
