"""The configuration of a perceptual weights generator: its sizes, and those of the model it writes deltas for."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from regraft.core.architectures import Architecture
from regraft.core.errors import Unsupported, UsageError

FORMAT: Final = "regraft-vlora"

TYPES = "qkvom"
"""Queries, keys, values, attention output, and a path beside the whole MLP."""

ROLES: Mapping[str, str] = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
"""The role that a type changes; `m` changes none."""

SHARED = "shared"
"""Name of the one sub-generator that all types share."""

Size = Annotated[int, Field(ge=1, le=1 << 24)]
Shapes = dict[str, tuple[int, ...]]


class GeneratorSettings(BaseModel):
    """Sizes of a generator; `config.json` of its folder.

    Legend: dg `dim`, dv `visual_dim`, P `pos_num`, r `rank`, L' `len(active_layers)`, d_in(t) `inputs[t]`, d_out(t)
    `outputs[t]`.

    Args:
        dim: width of the generator; a multiple of `heads`.
        depth: blocks of each sub-generator.
        heads: attention heads of a block.
        ffn_ratio: width of a block's feed-forward, in `dim`.
        visual_dim: width of an image's features.
        pos_num: features of an image: patches.
        rank: of every delta.
        alpha: deltas are multiplied by alpha / rank; None means rank.
        types: which weights get a delta, letters of `TYPES`.
        weights_sep: whether each type has a sub-generator of its own.
        skip_layers: k; layers k-1, 2k-1, ... (from 0) get deltas.
        num_layers: of the language model.
        inputs, outputs: features that each type reads and writes in a layer of the language model.
        model_type: of the language model; None if any of these shapes will do.
        vision_tower: whose features it was trained with: a hub id or a folder; None if it is not known.
        select_layer: which of the vision tower's hidden states, as an index; -2 is the last but one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["regraft-vlora"] = FORMAT
    version: Literal[1] = 1
    dim: Size = 512
    depth: Annotated[int, Field(ge=1, le=1024)] = 8
    heads: Size = 16
    ffn_ratio: Annotated[float, Field(gt=0, le=64, allow_inf_nan=False)] = 4.0
    visual_dim: Size = 1024
    pos_num: Size = 576
    rank: Size = 64
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    types: Annotated[str, Field(min_length=1, max_length=len(TYPES))] = TYPES
    weights_sep: bool = True
    skip_layers: Size = 4
    num_layers: Annotated[int, Field(ge=1, le=1 << 14)]
    inputs: dict[str, Size]
    outputs: dict[str, Size]
    model_type: str | None = None
    vision_tower: str | None = None
    select_layer: int = -2

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.types)) != len(self.types) or not set(self.types) <= set(TYPES):
            raise ValueError(f"types: expected some of the letters {TYPES}, each once, found {self.types!r}")
        if self.dim % self.heads:
            raise ValueError(f"dim: {self.dim} is no multiple of heads, {self.heads}")
        if self.ffn_size < 1:
            raise ValueError(f"ffn_ratio: {self.ffn_ratio} leaves no width")
        if self.skip_layers > self.num_layers:
            raise ValueError(f"skip_layers: {self.skip_layers} leaves none of the {self.num_layers} layers active")
        for key, sizes in (("inputs", self.inputs), ("outputs", self.outputs)):
            if set(sizes) != set(self.types):
                raise ValueError(f"{key}: expected a size for each of the types {self.types}, found {sorted(sizes)}")
            if wrong := [letter for letter in self.types if sizes[letter] < self.rank]:
                raise ValueError(
                    f"rank: {self.rank} is larger than a dimension: {key} of {wrong[0]} is {sizes[wrong[0]]}"
                )
        if "m" in self.types and self.inputs["m"] != self.outputs["m"]:
            raise ValueError("outputs: m goes around the MLP, so it writes as many features as it reads")
        return self

    @property
    def scale(self) -> float:
        """s of ΔW = s·B Aᵀ: alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def ffn_size(self) -> int:
        """Width of a block's feed-forward."""
        return int(self.dim * self.ffn_ratio)

    @property
    def active_layers(self) -> tuple[int, ...]:
        """Layers that get deltas, from 0."""
        return tuple(range(self.skip_layers - 1, self.num_layers, self.skip_layers))

    @property
    def groups(self) -> dict[str, str]:
        """The sub-generators by name, with the types that each makes factors for."""
        return {letter: letter for letter in self.types} if self.weights_sep else {SHARED: self.types}

    def head_widths(self, types: str) -> tuple[int, ...]:
        """The different d_in of `types`: each has an output head, since no linear layer gives two widths."""
        return tuple(dict.fromkeys(self.inputs[letter] for letter in types))

    def shapes(self) -> Shapes:
        """Every tensor of the generator by name, with its shape."""
        dg, layers = self.dim, len(self.active_layers)
        found: Shapes = {
            "visual_proj.weight": (dg, self.visual_dim),
            "visual_proj.bias": (dg,),
            "pos_embed": (1, self.pos_num, dg),
        }
        for name, types in self.groups.items():
            start = f"gen.{name}."
            found[f"{start}queries"] = (1, len(types) * layers, dg)
            for number in range(self.depth):
                found |= {f"{start}decoders.{number}.{key}": shape for key, shape in self._block().items()}
            found |= {f"{start}norm.weight": (dg,), f"{start}norm.bias": (dg,)}
            for width in self.head_widths(types):
                found[f"{start}weights_head.{width}.weight"] = (width * self.rank, dg)
                found[f"{start}weights_head.{width}.bias"] = (width * self.rank,)
        return found | {f"B.{letter}": (layers, self.outputs[letter], self.rank) for letter in self.types}

    def _block(self) -> Shapes:
        dg, wide = self.dim, self.ffn_size
        found: Shapes = {}
        for name in ("self_attn", "cross_attn"):
            found |= {f"{name}.in_proj_weight": (3 * dg, dg), f"{name}.in_proj_bias": (3 * dg,)}
            found |= {f"{name}.out_proj.weight": (dg, dg), f"{name}.out_proj.bias": (dg,)}
        found |= {"linear1.weight": (wide, dg), "linear1.bias": (wide,)}
        found |= {"linear2.weight": (dg, wide), "linear2.bias": (dg,)}
        return found | {f"norm{number}.{part}": (dg,) for number in (1, 2, 3) for part in ("weight", "bias")}

    @property
    def num_parameters(self) -> int:
        """Parameters of the generator, counted without making one."""
        return sum(prod(shape) for shape in self.shapes().values())


def sizes_in(architecture: Architecture, types: str, layers: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """d_in and d_out of every type in a language model.

    Args:
        architecture: its roles.
        types: letters of `TYPES`.
        layers: those that get deltas; the sizes are the same in all of them.

    Raises:
        Unsupported: it has no such role there, or layers differ.
    """
    found: dict[str, tuple[int, int]] = {}
    for letter in types:
        if letter == "m":
            found[letter] = (architecture.hidden_size, architecture.hidden_size)
            continue
        sizes = {}
        for layer in layers:
            slot = architecture.slot(ROLES[letter], layer)
            sizes[layer] = (slot.num_columns or 0, slot.num_rows)
        if len(set(sizes.values())) > 1:
            raise Unsupported(
                f"layers differ in the size of {ROLES[letter]}, and a generator makes one size of delta for each type",
                where=f"{architecture.model_type}: layers {', '.join(map(str, sizes))}",
                found=sorted(set(sizes.values())), remedy=f"leave {letter} out of the types",
            )  # fmt: skip
        found[letter] = sizes[layers[0]]
    return found


def settings_for(
    architecture: Architecture, *, types: str = TYPES, skip_layers: int = 4, **sizes: object
) -> GeneratorSettings:
    """Settings of a generator for the model with this architecture.

    Args:
        architecture: the language model's.
        types, skip_layers: as in `GeneratorSettings`.
        sizes: other fields of `GeneratorSettings`, such as `dim`, `rank`, `visual_dim`.

    Raises:
        Unsupported: as `sizes_in`.
        UsageError: sizes that contradict each other or the model.
    """
    if not types or not set(types) <= set(TYPES):
        raise UsageError("no such types", where="types", expected=f"letters of {TYPES}", found=types)
    layers = tuple(range(skip_layers - 1, architecture.num_layers, skip_layers)) if skip_layers > 0 else ()
    if not layers:
        raise UsageError("no layer of the model would be active", where="skip_layers",
                         expected=f"1 to {architecture.num_layers}", found=skip_layers)  # fmt: skip
    found = sizes_in(architecture, types, layers)
    facts = {
        **sizes,
        "types": types,
        "skip_layers": skip_layers,
        "num_layers": architecture.num_layers,
        "inputs": {letter: size[0] for letter, size in found.items()},
        "outputs": {letter: size[1] for letter, size in found.items()},
        "model_type": architecture.model_type,
    }
    try:
        return GeneratorSettings.model_validate(facts)
    except ValueError as error:
        raise UsageError("the generator cannot have these sizes", where="generator",
                         found=faults(error), remedy="correct them") from None  # fmt: skip


def faults(error: ValueError) -> str:
    """What a pydantic error says, in one line."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    told = []
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        message = one["msg"].removeprefix("Value error, ")
        place = ".".join(map(str, one["loc"]))
        told.append(f"{place}: {message}" if place else message)
    return "; ".join(told[:5])
