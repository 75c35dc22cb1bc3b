"""Parameters of `grow`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.transformation import Params

Size = Annotated[int, Field(ge=1)]

_SIZES = ("layers", "intermediate_size", "moe_intermediate_size", "heads", "kv_heads", "hidden_size")
_NEEDS = {
    "placement": ("layers",),
    "new_neurons": ("intermediate_size", "moe_intermediate_size"),
    "noise": ("intermediate_size", "moe_intermediate_size"),
    "seed": ("intermediate_size", "moe_intermediate_size"),
}


class GrowParams(Params):
    """The new sizes; what is not given stays."""

    layers: Size | None = Field(None, description="Decoder layers of the grown model.")
    placement: Literal["stack", "interpolate"] = Field(
        "stack",
        description="Where new layers stand. stack: behind the old ones, copies of layer 0, 1, 2 and so on. "
        "interpolate: evenly among the old ones, each behind the layer that it copies.",
    )
    intermediate_size: Size | None = Field(
        None, description="Width of the MLPs; in a model whose every layer is a mixture, that of each expert."
    )
    moe_intermediate_size: Size | None = Field(
        None, description="Width of each expert, where the experts have a width of their own (qwen3_moe)."
    )
    new_neurons: Literal["split", "zero"] = Field(
        "split",
        description="What new neurons are; their gate and up rows are those of old neurons either way. split: an old "
        "neuron's down column is shared out between it and its copy, so a model at most doubles. zero: the new down "
        "columns are 0.",
    )
    noise: float = Field(
        0.1,
        ge=0.0,
        le=0.5,
        description="new_neurons = split: how far the two shares of a weight w may lie from w/2, in units of w. Their "
        "sum is w whatever the noise; without noise a neuron and its copy stay alike in training.",
    )
    seed: int = Field(0, ge=0, description="Of the noise.")
    heads: Size | None = Field(
        None, description="Query heads. Whole key-value groups are added, so it is a multiple of the heads that share "
        "a key-value head."
    )  # fmt: skip
    kv_heads: Size | None = Field(
        None, description="Key-value heads; says the same as `heads`, and one of the two is enough."
    )
    hidden_size: Size | None = Field(None, description="Width of the residual stream.")

    @model_validator(mode="after")
    def _keys_that_go_together(self) -> Self:
        if all(getattr(self, name) is None for name in _SIZES):
            raise ValueError(f"give at least one new size: {', '.join(_SIZES)}")
        for name, sizes in _NEEDS.items():
            if name in self.model_fields_set and all(getattr(self, size) is None for size in sizes):
                raise ValueError(f"{name} has no effect without {' or '.join(sizes)}: remove it")
        if self.new_neurons == "zero" and (given := {"noise", "seed"} & self.model_fields_set):
            raise ValueError(f'{min(given)} is for new_neurons = "split": remove it')
        return self
