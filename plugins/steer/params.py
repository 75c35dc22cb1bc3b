"""Parameters of `steer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from regraft.core.data.settings import DataSettings
from regraft.core.layers import Layers
from regraft.core.recipe.references import DataReference
from regraft.core.transformation import Params

Site = Literal["residual", "mlp_out", "attn_out", "head", "kv-group"]
Normalise = Literal["none", "unit", "activation-norm", "deviation"]

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]

_WITHOUT_EFFECT = ("learn", "end", "min_tokens", "too_long", "pack", "restart_positions")
"""Keys of training data that say nothing of prompts."""


class PromptSettings(DataSettings):
    """A set of prompts: rows of data, whole, or texts in the recipe itself.

    Args:
        source: as of training data; a row's text, its prompt followed by its completion, or its chat is the prompt.
        prompts: the texts themselves, in place of a source.
        text_unit: what one prompt of a plain text file is.
    """

    source: DataReference | tuple[DataReference, ...] = ()
    prompts: tuple[Text, ...] = ()
    text_unit: Literal["file", "paragraph", "line"] = "line"

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if bool(self.sources) == bool(self.prompts):
            raise ValueError("give either `source` or `prompts`")
        if given := [name for name in _WITHOUT_EFFECT if name in self.model_fields_set]:
            raise ValueError(f"{given[0]} is for training data, and has no effect on prompts: remove it")
        return self


def _table(value: Any) -> Any:
    """The table that `value` is short for; its arrays as tuples, since what a function returns is no longer JSON."""
    table = {"source": value} if isinstance(value, str | list | tuple) else value
    if isinstance(table, dict):
        return {key: tuple(item) if isinstance(item, list) else item for key, item in table.items()}
    return table


Prompts = Annotated[
    PromptSettings,
    BeforeValidator(_table, json_schema_input_type=DataReference | tuple[DataReference, ...] | PromptSettings),
]
"""A recipe's key for prompts: a file, several, or a table."""


class SteerParams(Params):
    """Which vectors, and how much of them: from a file, or from the activations of prompts."""

    vectors: Path | None = Field(
        None,
        description="A safetensors file whose tensors say where they go: `layers.3.attn_out` and `layers.3.mlp_out` "
        "([hidden_size]), `layers.3.heads.0` and `layers.3.kv_groups.0` ([head_dim]). Layers and heads count from 0.",
    )
    positive: Prompts | None = Field(
        None,
        description="In place of vectors: prompts to steer towards, a prompt a row or line; or a table with `source` "
        "and how rows are read, or with `prompts`, the texts themselves. A vector is the mean of their activations, "
        "less that of `negative`.",
    )
    negative: Prompts | None = Field(
        None,
        description="Prompts to steer away from. Without them, which needs weighting = entropy, the plain mean of "
        "`positive` takes their place.",
    )
    site: Site = Field(
        "residual",
        description="Where activations are taken and the vector is added. residual: the residual stream behind a "
        "layer, by way of its MLP output. mlp_out, attn_out: the output of MLP or attention. head: of single heads, "
        "before o_proj. kv-group: of the heads that share a key-value head.",
    )
    layers: Layers | None = Field(
        None,
        description='The layers: a number, several, or a range such as `"8-12"`, `"8-"`. They count from 0. Required '
        "for residual, mlp_out and attn_out; for heads, all layers if not given.",
    )
    heads: Count | Annotated[tuple[tuple[Index, Index], ...], Field(min_length=1)] | Path | None = Field(
        None,
        description="site = head or kv-group: how many of the layers' heads, those that tell the prompts apart best; "
        "or a list of [layer, head], or a heads.json. Default: all heads of the layers.",
    )
    position: Literal["last", "mean"] = Field(
        "last",
        description="last: the activation at the last token of a prompt. mean: the mean over its tokens but the first, "
        "at which many models keep values a hundred times larger, whatever the prompt.",
    )
    weighting: Literal["mean", "entropy"] = Field(
        "mean",
        description="How the activations of `positive` are averaged. entropy: weighted by the entropy of the model's "
        "next token, as in EAST.",
    )
    answers: Annotated[tuple[Text, ...], Field(min_length=2)] | None = Field(
        None,
        description="weighting = entropy: the answers, one token each, over which the entropy is taken. Default: every "
        "token.",
    )
    normalise: Normalise = Field(
        "none",
        description="none: vectors as they come. unit: of length 1. activation-norm: as long as the activations of the "
        "prompts are on average. deviation: of the length of their standard deviation along the vector, as in ITI.",
    )
    strength: float = Field(1.0, allow_inf_nan=False, description="Multiplies every vector.")
    mode: Literal["auto", "keep-class"] = Field(
        "auto",
        description="auto: where the model's class has no bias in that place, write the model as another stock class "
        "that has one and computes the same (Qwen2, Mistral and Phi-3 as Llama or SmolLM3). keep-class: refuse.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="In which activations are computed; bfloat16 takes half the memory."
    )
    batch_size: Count = Field(8, description="Prompts that run together.")

    @property
    def by_head(self) -> bool:
        """Whether every head has a vector of its own."""
        return self.site in ("head", "kv-group")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.vectors is None) == (self.positive is None):
            raise ValueError("give either `vectors`, a file, or `positive`, prompts to compute the vectors from")
        if self.vectors is not None:
            own = ("vectors", "strength", "mode")
            if stray := [name for name in type(self).model_fields if name in self.model_fields_set - set(own)]:
                raise ValueError(
                    f"{stray[0]} is for vectors computed from prompts (`positive`), not for a file: remove it"
                )
        return self

    @model_validator(mode="after")
    def _what_is_measured(self) -> Self:
        if self.positive is None:
            return self
        if self.negative is None and self.weighting == "mean":
            raise ValueError('without `negative` the plain mean cancels: give it, or weighting = "entropy"')
        if self.answers is not None and self.weighting != "entropy":
            raise ValueError('answers is for weighting = "entropy"')
        if self.heads is not None and not self.by_head:
            raise ValueError('heads is for site = "head" and "kv-group"')
        if self.layers is None and not self.by_head:
            raise ValueError(f'site = "{self.site}" needs `layers`, such as layers = "8-12"')
        if self.layers is not None and isinstance(self.heads, (tuple, Path)):
            raise ValueError("`heads` names the layers already: remove `layers`")
        if isinstance(self.heads, int) and self.negative is None:
            raise ValueError("a number of heads is chosen by how well they tell `positive` from `negative`: give both")
        return self
