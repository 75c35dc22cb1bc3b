"""Which sizes grow, from what to what, and who is refused. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.architectures.families import built_in
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported, UsageError
from regraft.plugins.grow.params import GrowParams

_LAYER_NORM = "its LayerNorm subtracts the mean over all channels, those that are 0 included"
_FIXED_HEADS = "its class takes hidden_size / heads for the width of a head, so more heads would be narrower ones"
_HIDDEN_REFUSED = {
    "gpt2": _LAYER_NORM,
    "gpt_neox": _LAYER_NORM,
    "falcon": _LAYER_NORM,
    "cohere2": _LAYER_NORM,
    "gemma3": "its vision projector writes into the residual stream and is not described",
}
_DIVISIBLE = ("llama", "gemma2", "gemma3", "gemma3_text")
"""Families whose stock config class wants a hidden size that is a multiple of the heads, whatever `head_dim` says."""
_HEADS_REFUSED = dict.fromkeys(("gpt2", "gpt_neox", "falcon"), _FIXED_HEADS)


@dataclass(frozen=True)
class Growth:
    """What grows.

    Args:
        architecture: the roles of the model as it is.
        layers: for each layer of the grown model, the layer that it comes from, and whether it is a new one.
        sizes: (old, new) of the sizes that grow, by the names that roles use: `hidden_size`, `intermediate_size`,
            `moe_intermediate_size`, `q_size` and `kv_size` (rows of the projections).
    """

    architecture: Architecture
    layers: tuple[tuple[int, bool], ...]
    sizes: Mapping[str, tuple[int, int]]

    @property
    def deeper(self) -> bool:
        """Whether there are new layers."""
        return any(new for _, new in self.layers)

    @property
    def num_heads(self) -> int:
        """Query heads of the grown model."""
        return self.after("q_size", self.architecture.num_heads * self.architecture.head_dim) // self._head_dim

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of the grown model."""
        return self.after("kv_size", self.architecture.num_kv_heads * self.architecture.head_dim) // self._head_dim

    @property
    def hidden_ratio(self) -> float:
        """Old hidden size over new."""
        old, new = self.sizes.get("hidden_size", (1, 1))
        return old / new

    @property
    def _head_dim(self) -> int:
        return self.architecture.head_dim

    def after(self, size: str, old: int) -> int:
        """The new value of a size that is `old` now."""
        return self.sizes[size][1] if size in self.sizes else old


def growth_of(checkpoint: Checkpoint, params: GrowParams) -> Growth:
    """The growth that `params` ask of `checkpoint`.

    Raises:
        Unsupported: the family cannot grow so and compute the same.
        UsageError: a size is no growth, or sizes do not fit each other.
        InputError: the tensors are not those of such a model.
    """
    architecture = _architecture(checkpoint)
    sizes = dict(_plain_sizes(architecture, params)) | _head_sizes(architecture, params)
    _refuse_by_name(architecture, sizes)
    if architecture.qk_norm == "full" and "q_size" in sizes and sizes["q_size"][1] % sizes["q_size"][0]:
        heads = architecture.num_heads
        raise Unsupported(
            f"{architecture.family} norms the queries of all heads together, and their mean square stays what it is "
            "only if every head is copied equally often",
            where="heads", expected=f"a multiple of {heads}", found=sizes["q_size"][1] // architecture.head_dim,
            remedy=f"double the heads to {2 * heads}",
        )  # fmt: skip
    _refuse_by_position(checkpoint, architecture, params)
    growth = Growth(architecture, _layers(architecture.num_layers, params), sizes)
    _check_divisible(growth)
    return growth


def _architecture(checkpoint: Checkpoint) -> Architecture:
    model_type = checkpoint.config.get("model_type")
    if checkpoint.config.get("auto_map"):
        raise Unsupported(
            "the checkpoint brings Python code of its own, and what that makes of other sizes is not known",
            where="config.json: auto_map", found=model_type, remedy="grow before the step that adds the code",
        )  # fmt: skip
    if isinstance(model_type, str) and model_type not in built_in():
        raise Unsupported(
            "growth is exact only where every tensor's part in the model is known, and this family is not in the table",
            where="config.json: model_type", expected=", ".join(sorted(built_in())), found=model_type,
            remedy="use a model of one of these families",
        )  # fmt: skip
    return architecture_of(checkpoint.config, checkpoint.specs, derive=False)


def _plain_sizes(architecture: Architecture, params: GrowParams) -> list[tuple[str, tuple[int, int]]]:
    found = []
    for name in ("intermediate_size", "moe_intermediate_size", "hidden_size"):
        new = getattr(params, name)
        if new is None:
            continue
        if not _used(architecture, name):
            other = "moe_intermediate_size" if name == "intermediate_size" else "intermediate_size"
            raise Unsupported(f"no layer of this model has that size: {architecture.family}", where=name, found=new,
                              remedy=f"remove it, or give {other}")  # fmt: skip
        old = architecture.layout.size(name)
        found.append((name, _grown(name, old, new)))
        if name != "hidden_size" and params.new_neurons == "split" and new > 2 * old:
            raise UsageError(
                "split neurons at most double an MLP", where=name, expected=f"at most {2 * old}", found=new,
                remedy='give new_neurons = "zero", or grow in two steps',
            )  # fmt: skip
    return found


def _used(architecture: Architecture, size: str) -> bool:
    """Whether a tensor of the model has this size along its rows or columns."""
    layout = architecture.layout
    return any(
        size == part.columns or size in dict(part.roles).values()
        for layer in range(-1, architecture.num_layers)
        for part in layout.present(layer)
    )


def _grown(name: str, old: int, new: int) -> tuple[int, int]:
    if new <= old:
        raise UsageError("is no growth", where=name, expected=f"more than the {old} there are", found=new,
                         remedy="give a larger size, or remove the key")  # fmt: skip
    return old, new


def _head_sizes(architecture: Architecture, params: GrowParams) -> dict[str, tuple[int, int]]:
    if params.heads is None and params.kv_heads is None:
        return {}
    group = architecture.num_heads // architecture.num_kv_heads
    heads = params.heads if params.heads is not None else (params.kv_heads or 0) * group
    kv_heads = params.kv_heads if params.kv_heads is not None else heads // group
    if kv_heads * group != heads:
        raise UsageError(
            f"{group} query heads share a key-value head, and only whole groups are added", where="heads, kv_heads",
            expected=f"heads = {group} times kv_heads", found=f"{heads} heads, {kv_heads} key-value heads",
            remedy="give one of the two",
        )  # fmt: skip
    _grown("heads", architecture.num_heads, heads)
    size = architecture.head_dim
    return {
        "q_size": (architecture.num_heads * size, heads * size),
        "kv_size": (architecture.num_kv_heads * size, kv_heads * size),
    }


def _refuse_by_name(architecture: Architecture, sizes: Mapping[str, tuple[int, int]]) -> None:
    for size, what, refused in (
        ("hidden_size", "hidden size", _HIDDEN_REFUSED),
        ("q_size", "number of heads", _HEADS_REFUSED),
    ):
        if size in sizes and architecture.model_type in refused:
            raise Unsupported(
                f"the {what} of {architecture.model_type} cannot grow exactly: {refused[architecture.model_type]}",
                where="hidden_size" if size == "hidden_size" else "heads",
                remedy="grow layers or intermediate_size",
            )


def _layers(num_layers: int, params: GrowParams) -> tuple[tuple[int, bool], ...]:
    """Where each layer comes from, and whether it is new."""
    if params.layers is None:
        return tuple((layer, False) for layer in range(num_layers))
    _grown("layers", num_layers, params.layers)
    if params.placement == "stack":
        return tuple((layer % num_layers, layer >= num_layers) for layer in range(params.layers))
    sources = [layer * num_layers // params.layers for layer in range(params.layers)]
    return tuple((source, bool(number) and sources[number - 1] == source) for number, source in enumerate(sources))


def _check_divisible(growth: Growth) -> None:
    hidden, heads = growth.after("hidden_size", growth.architecture.hidden_size), growth.num_heads
    if growth.architecture.model_type in _DIVISIBLE and hidden % heads:
        raise UsageError(
            f"the class of {growth.architecture.model_type} wants a hidden size that is a multiple of the heads",
            where="hidden_size, heads", expected=f"a multiple of {heads}", found=hidden,
            remedy="choose other sizes, or grow both",
        )  # fmt: skip


def _refuse_by_position(checkpoint: Checkpoint, architecture: Architecture, params: GrowParams) -> None:
    """GPT-2 may divide attention by the number of the layer, which interpolation changes."""
    if params.layers is None or params.placement == "stack":
        return
    if checkpoint.config.get("scale_attn_by_inverse_layer_idx"):
        raise Unsupported(
            f"{architecture.model_type} scales attention by the number of the layer, which interpolation changes",
            where="config.json: scale_attn_by_inverse_layer_idx", found="true", remedy='give placement = "stack"',
        )  # fmt: skip
