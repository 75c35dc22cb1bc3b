"""Where vectors go that a step computes: known from parameters and config alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from regraft.core.architectures import Architecture
from regraft.core.errors import Unsupported, UsageError
from regraft.core.head_file import check_heads, read_heads_of
from regraft.core.layers import layers_of
from regraft.core.offsets import HeadOffset, Offset, ResidualBias
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor
from regraft.plugins.steer.params import Site, SteerParams

_NAMES = {"residual": "mlp_out", "mlp_out": "mlp_out", "attn_out": "attn_out", "head": "heads", "kv-group": "kv_groups"}


@dataclass(frozen=True)
class Place:
    """One vector's place.

    Args:
        layer: counts from 0.
        site: as in the parameters.
        head: or key-value head; None where the whole layer has one vector.
    """

    layer: int
    site: Site
    head: int | None = None

    @property
    def name(self) -> str:
        """What a file of vectors calls it."""
        name = f"layers.{self.layer}.{_NAMES[self.site]}"
        return name if self.head is None else f"{name}.{self.head}"

    def spec(self, architecture: Architecture) -> TensorSpec:
        """Of its vector."""
        size = architecture.hidden_size if self.head is None else architecture.head_dim
        return TensorSpec(self.name, "F32", (size,))

    def offset(self, vector: LazyTensor, strength: float) -> Offset:
        """`strength · vector`, added there."""
        if self.head is not None:
            return HeadOffset(self.layer, self.head, vector, "head" if self.site == "head" else "kv-group", strength)
        return ResidualBias(self.layer, "attn_out" if self.site == "attn_out" else "mlp_out", vector, strength)


def places_of(params: SteerParams, architecture: Architecture) -> list[Place]:
    """Every place that may get a vector, in the order of a file of vectors, which is that of their names.

    Raises:
        UsageError: the model has no such layer or head, or a head is named twice.
        InputError: the heads.json is not valid.
        Unsupported: the model has no such site.
    """
    if params.by_head:
        places = [Place(layer, params.site, head) for layer, head in _heads(params, architecture)]
    else:
        assert params.layers is not None
        places = [Place(layer, params.site) for layer in layers_of(params.layers, architecture.num_layers)]
    if params.site == "residual":
        for place in places:
            _check_residual(architecture, place.layer)
    return sorted(places, key=lambda place: place.name)


def _heads(params: SteerParams, architecture: Architecture) -> list[tuple[int, int]]:
    per_layer = architecture.num_heads if params.site == "head" else architecture.num_kv_heads
    given = params.heads
    if given is None or isinstance(given, int):
        layers = range(architecture.num_layers)
        chosen = layers if params.layers is None else layers_of(params.layers, architecture.num_layers)
        heads = [(layer, head) for layer in chosen for head in range(per_layer)]
        if isinstance(given, int) and given > len(heads):
            raise UsageError("there are fewer heads to choose from", where="heads", expected=f"at most {len(heads)}",
                             found=given, remedy="choose fewer, or from more layers")  # fmt: skip
        return heads
    if isinstance(given, Path):
        return list(read_heads_of(given, architecture.num_layers, per_layer, site=params.site).heads)
    named = list(given)
    check_heads(named, architecture.num_layers, per_layer, where="heads")
    if twice := [head for head in named if named.count(head) > 1]:
        raise UsageError("a head is named twice", where="heads", found=list(twice[0]), remedy="name it once")
    return named


def _check_residual(architecture: Architecture, layer: int) -> None:
    """Refuse what is known to stand between the MLP output and the residual stream; the run tries it for the rest."""
    multiplier = architecture.settings.get("residual_multiplier", 1.0)
    if architecture.has("mlp_output_norm", layer):
        raise residual_refusal(architecture, layer, "a norm of the MLP output")
    if multiplier != 1.0:
        raise residual_refusal(architecture, layer, f"residual_multiplier {multiplier}")


def residual_refusal(architecture: Architecture, layer: int, found: str) -> Unsupported:
    """What to say where a constant in the MLP output is not that constant in the residual stream."""
    return Unsupported(
        "the residual stream does not take up the MLP output as it is, so that a vector of one is none of the other",
        where=f"{architecture.model_type}, layer {layer}",
        found=found,
        remedy='measure and add at one place: site = "mlp_out" or "attn_out"',
    )
