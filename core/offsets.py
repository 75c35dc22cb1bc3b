"""Constants that methods find for a model: what they add to the residual stream, and where; how they scale heads.

Where an offset goes, exactly:

- `attn_out`: to the output of o_proj, before any norm, multiplier or residual sum that follows it;
- `mlp_out`: to the output of down_proj, likewise;
- `head`: to the output of one attention head, which is `head_dim` inputs of o_proj;
- `kv-group`: to the output of all heads that share a key-value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from regraft.core.architectures import Architecture
from regraft.core.errors import InputError, UsageError
from regraft.core.specs import FLOAT_CODES
from regraft.core.tensors import LazyTensor

ResidualSite = Literal["attn_out", "mlp_out"]
HeadSite = Literal["head", "kv-group"]

_ROLES = {"attn_out": "o_proj", "mlp_out": "down_proj", "head": "o_proj", "kv-group": "v_proj"}


@dataclass(frozen=True)
class ResidualBias:
    """`scale · vector`, added to the output of attention or MLP at every position.

    Steering vectors, EAST (arXiv 2406.00244) and every other constant in the residual stream are of this form.

    Args:
        layer: counts from 0.
        site: see the module.
        vector: [hidden_size], any float dtype.
        scale: a factor.
    """

    layer: int
    site: ResidualSite
    vector: LazyTensor
    scale: float = 1.0

    @property
    def role(self) -> str:
        """The projection whose bias takes it up."""
        return _ROLES[self.site]

    def check(self, architecture: Architecture) -> None:
        """Refuse what does not fit the model.

        Raises:
            UsageError: there is no such layer.
            InputError: the vector has another shape, or no float dtype.
        """
        check_layer(architecture, self.layer, self.vector)
        _check_vector(self.vector, architecture.hidden_size, "hidden_size")


@dataclass(frozen=True)
class HeadOffset:
    """`scale · vector`, added to what one attention head gives to o_proj, at every position (LoFiT, ITI).

    Args:
        layer: counts from 0.
        head: counts query heads, or key-value heads where the site is `kv-group`.
        vector: [head_dim], any float dtype.
        site: see the module.
        scale: a factor.
    """

    layer: int
    head: int
    vector: LazyTensor
    site: HeadSite = "head"
    scale: float = 1.0

    @property
    def role(self) -> str:
        """The projection whose bias takes it up."""
        return _ROLES[self.site]

    def check(self, architecture: Architecture) -> None:
        """Refuse what does not fit the model.

        Raises:
            UsageError: there is no such layer or head.
            InputError: the vector has another shape, or no float dtype.
        """
        grouped = self.site == "kv-group"
        check_layer(architecture, self.layer, self.vector)
        _check_head(architecture, self.head, self.vector, grouped=grouped)
        _check_vector(self.vector, architecture.head_dim, "head_dim")


@dataclass(frozen=True)
class HeadScale:
    """What one attention head gives to o_proj, times `1 + scale · vector`, entry by entry (stage 1 of LoFiT).

    Args:
        layer: counts from 0.
        head: counts query heads.
        vector: [head_dim], any float dtype.
        scale: a factor.
    """

    layer: int
    head: int
    vector: LazyTensor
    scale: float = 1.0

    def check(self, architecture: Architecture) -> None:
        """Refuse what does not fit the model.

        Raises:
            UsageError: there is no such layer or head.
            InputError: the vector has another shape, or no float dtype.
        """
        check_layer(architecture, self.layer, self.vector)
        _check_head(architecture, self.head, self.vector, grouped=False)
        _check_vector(self.vector, architecture.head_dim, "head_dim")


Offset = ResidualBias | HeadOffset


def check_layer(architecture: Architecture, layer: int, vector: LazyTensor) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        UsageError: it does not.
    """
    if not 0 <= layer < architecture.num_layers:
        raise UsageError(
            f"there is no layer {layer}",
            where=vector.spec.name,
            expected=f"0 to {architecture.num_layers - 1}",
            found=layer,
            remedy="name a layer that the model has; they count from 0",
        )


def _check_head(architecture: Architecture, head: int, vector: LazyTensor, *, grouped: bool) -> None:
    count = architecture.num_kv_heads if grouped else architecture.num_heads
    kind = "key-value head" if grouped else "head"
    if not 0 <= head < count:
        raise UsageError(
            f"there is no {kind} {head}",
            where=vector.spec.name,
            expected=f"0 to {count - 1}",
            found=head,
            remedy=f"name a {kind} that the model has; they count from 0",
        )


def _check_vector(vector: LazyTensor, size: int, what: str) -> None:
    if vector.spec.shape != (size,):
        raise InputError(
            "the vector has another shape than the model asks for",
            where=vector.spec.name,
            expected=f"[{size}], the {what} of the model",
            found=list(vector.spec.shape),
            remedy="use vectors made for this model",
        )
    if vector.spec.dtype not in FLOAT_CODES:
        raise InputError(
            "the vector is in a dtype that cannot be computed with",
            where=vector.spec.name,
            expected=", ".join(sorted(FLOAT_CODES)),
            found=vector.spec.dtype,
            remedy="save it in a float dtype",
        )
