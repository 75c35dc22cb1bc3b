"""Parameters of `fourier-head`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.settings import Data
from regraft.core.recipe.references import OutputPath
from regraft.core.training.settings import Positive, Share
from regraft.core.transformation import Params
from regraft.plugins.fourier_head.segments.params import SegmentSettings

Count = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False)]

SERIES_RANGE = (-5.0, 5.0)
"""What the ends of bins of series are worth, after scaling."""

_OF_SERIES = {"source", "columns", "max_rows", "max_bad_rows", "split", "subset"}
"""What a table of data may say of series."""


class LearnSettings(Params):
    """How weights learn, from data of its own; the loop is that of every training step.

    Args:
        data: texts, or prompts with completions.
        weights: `head`, the coefficients and the gate; `lora`, these and low-rank adapters of queries and values,
            merged in the end; `full`, everything.
        rank: of the adapters.
        target: `labels`, the tokens of the data; `base`, at every position what the head before predicted there.
        epochs, steps: passes over the data, and the most steps.
        batch_size, micro_batch: sequences of a step, and those computed at once.
        lr, warmup_steps, schedule: the learning rate.
        clip_norm: longest gradient.
        precision: of products.
        regularizer: `upstream`, 4π² Σ k²|c_k|²; `normalized`, ∫ p'² = π² Σ k²|ĉ_k|²; of all bins' densities.
        regularizer_weight: its factor.
        held_out: share of the sequences, or of the series, that measures the loss before and after, and is not trained
            on.
        log, tensorboard: where each step is recorded, with times.
    """

    data: Data
    weights: Literal["head", "lora", "full"] = "head"
    rank: Count = 8
    target: Literal["labels", "base"] = "labels"
    epochs: Count = 1
    steps: Count | None = None
    batch_size: Count = 8
    micro_batch: Count | None = None
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    clip_norm: Positive | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    regularizer: Literal["none", "upstream", "normalized"] = "none"
    regularizer_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-6
    held_out: Share = 0.1
    log: OutputPath | None = None
    tensorboard: OutputPath | None = None

    @model_validator(mode="after")
    def _target_fits(self) -> Self:
        if self.target == "base" and self.weights != "head":
            raise ValueError('target = "base" teaches the head alone: leave `weights` out')
        return self


class SeriesSettings(Params):
    """Time series whose values are bins, after scaling; the first four keys go with the checkpoint.

    Args:
        context: values that are read before a forecast.
        horizon: values that a forecast has.
        scaling: by the values of the context. `mean`: x / mean |x|. `standard`: (x - mean) / deviation.
        period: values of a season, for series that do not say.
        stride: values from the start of one window of the training to that of the next.
        learn: `all` values of a window from those before, or those of the `horizon` alone.
        reserve: the last values of every series, which the training does not see.
    """

    context: Annotated[int, Field(ge=2)]
    horizon: Count
    scaling: Literal["mean", "standard"] = "mean"
    period: Count = 1
    stride: Count = 1
    learn: Literal["all", "horizon"] = "all"
    reserve: Annotated[int, Field(ge=0)] = 0

    @property
    def block(self) -> dict[str, Any]:
        """`time_series` of config.json."""
        return self.model_dump(include={"context", "horizon", "scaling", "period"})


class FourierHeadParams(Params):
    """Parameters of `fourier-head`."""

    mode: Literal["hybrid", "replace", "segments"] = Field(
        "hybrid",
        description="hybrid: the bins share a gate inside the softmax with the text, whose logits stay. replace: the "
        "whole vocabulary is bins. segments: no head; the frozen model forecasts series, a segment at a position.",
    )
    tokens: Annotated[str, Field(min_length=1)] | None = Field(
        None, description='The bins by their tokens: "0..199" from one whole number to another, or "a..b" from one '
        "token to another, in the order of their ids."
    )  # fmt: skip
    ids: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] | None = Field(
        None, description="The bins by the first and the last token id."
    )
    pattern: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="The bins as all tokens whose text is matched as a whole by this regular expression."
    )
    bins: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Append so many tokens to the vocabulary, with rows, as bins."
    )
    range: tuple[Number, Number] | None = Field(
        None, description="What the two ends of the bins are worth, of appended ones or of series. Default: -1 and 1; "
        "of series -5 and 5, after scaling."
    )  # fmt: skip
    num_frequencies: Count = Field(
        12, description="N, below the number of bins; about 3 / (π σ) for densities of width σ on [-1, 1]."
    )
    quadrature: Literal["midpoint", "exact"] | None = Field(
        None, description="A bin's mass by the density at its midpoint, or by its integral. Default: midpoint, or "
        "exact where a margin or values need it."
    )  # fmt: skip
    coordinate: Literal["index", "values"] = Field(
        "index", description="Bins of equal width, or as wide as the values of their tokens lie apart."
    )
    values: tuple[Number, ...] | None = Field(
        None, description='Ascending values of the bins, for coordinate = "values". Default: the numbers that the '
        "tokens spell."
    )  # fmt: skip
    margin: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Kept free at both ends of [-1, 1], where the density is periodic: mass leaks from end to end."
    )
    floor: Annotated[float, Field(ge=0, le=1)] = Field(
        5e-4, description="Mass that is shared out evenly among the bins, so that none is impossible."
    )
    init: Literal["rows", "uniform", "upstream"] = Field(
        "rows", description="rows: the closed form nearest to the rows that the bins had. uniform. upstream: at "
        "random, as small as in the reference code."
    )  # fmt: skip
    weights: Path | None = Field(
        None, description="A .safetensors file with the coefficients' weight and bias as the reference code names "
        "them (fc_extract_autocorrelation_params), in place of `init`."
    )  # fmt: skip
    gate: Literal["linear", "keep_rows"] = Field(
        "linear", description="linear: g = mean row · h + log bins, which keeps the mass of numbers to first order. "
        "keep_rows: keeps the rows, and the mass exactly."
    )  # fmt: skip
    untie: bool = Field(
        False, description="Give text rows of its own to a head that is tied. By default it goes on reading the "
        "embeddings."
    )  # fmt: skip
    series: SeriesSettings | None = Field(
        None, description="The bins are values of time series, and the data of `train` are series: "
        "{ context = 96, horizon = 24 }."
    )  # fmt: skip
    calibrate: LearnSettings | None = Field(
        None, description='A first training, of the head towards what the old head predicts: { data = "..." }.'
    )
    train: LearnSettings | None = Field(None, description='A training on tokens: { data = "...", weights = "head" }.')
    segments: SegmentSettings | None = Field(
        None, description='mode = segments: { data = "series.jsonl", length = 96, context = 672 }; no other key then.'
    )

    @property
    def exact(self) -> bool:
        """Whether masses are integrals."""
        needed = self.margin > 0 or self.coordinate == "values"
        return needed if self.quadrature is None else self.quadrature == "exact"

    @property
    def ends(self) -> tuple[float, float] | None:
        """What the ends of bins of equal width are worth; None where the tokens say."""
        return self.range if self.range is not None or self.series is None else SERIES_RANGE

    @model_validator(mode="after")
    def _segments_alone(self) -> Self:
        if (self.mode == "segments") != (self.segments is not None):
            raise ValueError('mode = "segments" and the table `segments` belong together')
        if self.segments is not None and (others := sorted(self.model_fields_set - {"mode", "segments"})):
            raise ValueError(f"mode segments takes the table `segments` alone: remove {', '.join(others)}")
        return self

    @model_validator(mode="after")
    def _one_range(self) -> Self:
        given = [name for name in ("tokens", "ids", "pattern", "bins") if getattr(self, name) is not None]
        if self.mode == "hybrid" and len(given) != 1:
            found = ", ".join(given) or "none of them"
            raise ValueError(f"the bins are named by one of tokens, ids, pattern, bins; found {found}")
        if self.mode == "replace" and given:
            raise ValueError(f"mode replace takes the whole vocabulary: remove {', '.join(given)}")
        if self.range is not None and self.bins is None and self.series is None:
            raise ValueError("range belongs to appended bins: give `bins`, or `values` for tokens that exist")
        if self.range is not None and self.coordinate == "values":
            raise ValueError('with coordinate = "values" the values say what the ends are worth: remove range')
        if self.range is not None and not self.range[0] < self.range[1]:
            raise ValueError(f"range is ascending, not {list(self.range)}")
        if self.ids is not None and self.ids[0] >= self.ids[1]:
            raise ValueError(f"ids are the first and the last of at least two bins, not {list(self.ids)}")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.bins is not None and self.num_frequencies >= self.bins:
            raise ValueError(f"num_frequencies ({self.num_frequencies}) is below the number of bins ({self.bins})")
        if self.quadrature == "midpoint" and self.coordinate == "values":
            raise ValueError('bins of unequal width need quadrature = "exact"')
        if self.quadrature == "midpoint" and self.margin > 0:
            raise ValueError('a margin needs quadrature = "exact"')
        if self.values is not None and self.coordinate != "values":
            raise ValueError('values belong to coordinate = "values"')
        if self.values is not None and any(a >= b for a, b in zip(self.values, self.values[1:], strict=False)):
            raise ValueError("values are strictly ascending")
        if self.bins is not None and self.coordinate == "values":
            raise ValueError('appended bins are of equal width: give tokens, ids or pattern for coordinate = "values"')
        if self.mode == "replace" and (self.gate != "linear" or self.untie):
            raise ValueError("mode replace has no gate and no text rows: remove gate and untie")
        if self.calibrate is not None and self.calibrate.weights != "head":
            raise ValueError("calibrate teaches the head alone: remove `weights` there")
        if self.calibrate is not None and self.bins is not None:
            raise ValueError("appended bins had no head before that calibrate could follow: remove it, or use train")
        if self.series is not None and self.train is not None:
            given = self.train.data.model_fields_set - _OF_SERIES
            if given:
                raise ValueError(
                    f"series are cut into windows by `series`: remove {', '.join(sorted(given))} of the data"
                )
        if self.train is not None and self.train.target != "labels":
            raise ValueError("train learns the tokens of the data; calibrate follows the old head")
        return self
