"""Parameters of `attention-calibration`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.layers import Layers
from regraft.core.transformation import Params

Count = Annotated[int, Field(ge=1)]
HeadPair = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]

ABSOLUTE, RELATIVE = 0.1, 5.0
"""tau of the released code, alpha of the paper."""


class AttentionCalibrationParams(Params):
    """Which heads are calibrated, or by what they are found, and what calibration does."""

    heads: Annotated[tuple[HeadPair, ...], Field(min_length=1)] | Path | None = Field(
        None,
        description="The heads: [[layer, head], ...], both from 0, or a heads.json such as this step reports. Without, "
        "they are searched for on `data`.",
    )
    data: Path | None = Field(
        None,
        description="For the search: a file of questions, each {prompt, options, answer}; see the page on attention "
        "calibration.",
    )
    held_out: Path | None = Field(
        None, description="Questions on which what was found is checked. Default: a third of `data`, drawn by the seed."
    )
    beta: float = Field(0.4, ge=0, le=1, allow_inf_nan=False, description="Share of its weight that a sink keeps.")
    tau_mode: Literal["absolute", "relative"] = Field(
        "absolute",
        description="absolute: a key is a sink if its mean weight is above tau, as in the released code. relative: "
        "above tau over the number of keys in sight, as the paper has it.",
    )
    tau: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="The threshold; by default 0.1 absolute, 5 relative."
    )
    scope: Literal["causal", "prompt"] = Field(
        "causal",
        description="causal: a row goes by the weights of the rows up to it, so that text that follows changes nothing "
        "before it. prompt: by those of the whole prompt, as in the paper; what follows it finds no new sinks.",
    )
    min_queries: Count = Field(4, description="A key that fewer rows see is no sink.")
    spare_first: bool = Field(True, description="The first token is never a sink.")
    layers: Layers = Field("2-", description="Layers that the search looks into: `2-`, `2-30`, one, or a list.")
    score: Literal["log-prob", "accuracy"] = Field(
        "log-prob",
        description="What a head is judged by: the mean log-probability of the right option among the options, or how "
        "often it is the highest.",
    )
    min_gain: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="A head is kept if the score gains more than this, alone."
    )
    passes: Count = Field(
        3, description="The first pass tries every head on a share of the questions, each further one the better half "
        "of the heads on twice as many; the last sees all."
    )  # fmt: skip
    batch_size: Count = Field(8, description="Texts of a forward pass.")

    @model_validator(mode="after")
    def _keys_that_go_together(self) -> Self:
        if (self.heads is None) == (self.data is None):
            raise ValueError("give either heads, or data to search for them")
        search = {"held_out", "layers", "score", "min_gain", "passes"} & self.model_fields_set
        if self.heads is not None and search:
            raise ValueError(f"{', '.join(sorted(search))}: for the search alone, and heads are given")
        return self

    @property
    def threshold(self) -> float:
        """tau, or its default."""
        return self.tau if self.tau is not None else ABSOLUTE if self.tau_mode == "absolute" else RELATIVE
