"""Parameters of `prune`."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.settings import Data
from regraft.core.layers import Layers
from regraft.core.transformation import Params

Role = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Count = Annotated[int, Field(ge=1)]

_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_FOR_WANDA = ("combine", "dtype", "batch_size")
_FOR_WEIGHTS = ("roles", "layers", "masks")


class SkipSettings(Params):
    """Layers whose MLP is switched off.

    Args:
        every: every so many layers.
        start: the first of them.
    """

    every: Count = 2
    start: Annotated[int, Field(ge=0)] = 0


class PruneParams(Params):
    """What goes, and by which score."""

    score: Literal["wanda", "magnitude"] = Field(
        "wanda",
        description="By what weights are compared. wanda: their size times the root mean square of their input on "
        "data, within each output row. magnitude: their size alone, within the whole matrix; needs no data.",
    )
    sparsity: float | None = Field(
        None, gt=0.0, lt=1.0, description="The share of weights that become 0: int(n times sparsity) of n that compare."
    )
    pattern: Annotated[str, Field(pattern=r"^[1-9]\d?:[1-9]\d?$")] | None = Field(
        None,
        description='In place of sparsity: "N:M", such as "2:4", keeps N of every M inputs of an output row, one '
        "behind the other.",
    )
    data: Data | None = Field(None, description="score = wanda: the texts that the inputs are measured on.")
    tasks: dict[str, Data] | None = Field(
        None,
        min_length=2,
        description="score = wanda, in place of data: several sets of data by name, which share one mask.",
    )
    combine: Literal["intersection", "mean"] = Field(
        "intersection",
        description="tasks: how they share it. intersection: what is among the lowest for every task goes, so fewer "
        "weights than `sparsity` says. mean: the lowest by the mean of the tasks' scores go.",
    )
    roles: Annotated[tuple[Role, ...], Field(min_length=1)] | None = Field(
        None, description="Which projections are pruned. Default: all that the layers have; never embeddings or head."
    )
    layers: Layers | None = Field(
        None, description='In which layers: a number, several, or a range such as `"8-12"`. Default: all.'
    )
    skip_ffn: SkipSettings | None = Field(
        None,
        description="Switch off the MLP of every so many layers from `start` on by down_proj = 0. The model gets "
        "neither smaller nor faster: only what it computes changes.",
    )
    masks: bool = Field(False, description="Put the masks into the report, one bit a weight: masks.safetensors.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="score = wanda: in which the model runs; bfloat16 takes half the memory."
    )
    batch_size: Count = Field(8, description="score = wanda: sequences that run together.")

    @property
    def prunes(self) -> bool:
        """Whether weights are compared at all, and not only MLPs switched off."""
        return self.sparsity is not None or self.pattern is not None

    @property
    def measured(self) -> dict[str, Data]:
        """The sets of data by name; one alone has the name `data`."""
        if self.tasks is not None:
            return self.tasks
        return {} if self.data is None else {"data": self.data}

    @model_validator(mode="after")
    def _how_many(self) -> Self:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("give either `sparsity` or `pattern`")
        if not self.prunes and self.skip_ffn is None:
            raise ValueError("give `sparsity`, `pattern` or `skip_ffn`: without, nothing changes")
        if self.pattern is not None:
            keep, group = map(int, self.pattern.split(":"))
            if keep >= group:
                raise ValueError(f"pattern {self.pattern} keeps everything: the first number must be the smaller one")
        return self

    @model_validator(mode="after")
    def _data_and_score(self) -> Self:
        if not self.prunes:
            stray = [name for name in ("score", "data", "tasks", *_FOR_WANDA, *_FOR_WEIGHTS) if self._given(name)]
            if stray:
                raise ValueError(f"{stray[0]} has no effect without sparsity or pattern: remove it")
            return self
        if self.score == "magnitude":
            if stray := [name for name in ("data", "tasks", *_FOR_WANDA) if self._given(name)]:
                raise ValueError(f'{stray[0]} is for score = "wanda": remove it')
            return self
        if (self.data is None) == (self.tasks is None):
            raise ValueError('score = "wanda" needs either `data` or `tasks`; score = "magnitude" needs none')
        if self.tasks is None and self._given("combine"):
            raise ValueError("combine is for several `tasks`: remove it")
        for name, data in self.measured.items():
            if not _TASK.fullmatch(name):
                raise ValueError(f"tasks: {name!r} is no name of a task: letters, digits, - and _, at most 32")
            if data.kind == "preference":
                raise ValueError(f'{name}: a preference pair is not one text: use kind = "completion"')
        return self

    def _given(self, name: str) -> bool:
        return name in self.model_fields_set
