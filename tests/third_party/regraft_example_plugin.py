"""Everything that a plugin can bring to regraft, in its smallest form.

Like any plugin it imports no torch before tensors are computed, so that `regraft plan` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from regraft import (
    Checkpoint,
    Edit,
    Family,
    Loaded,
    Measured,
    Measuring,
    Metric,
    Operation,
    Params,
    Patch,
    Reference,
    Sample,
    Source,
    Transformation,
    Unsupported,
    WeightSpace,
    embedding,
    head,
    hookimpl,
    linear,
    norm,
    open_checkpoint,
)

if TYPE_CHECKING:
    import torch
    import typer

regraft_api = ">=1.0,<2"


@dataclass(frozen=True)
class Multiply(Operation):
    """`out = factor · in`, in fp32."""

    input: str
    factor: float
    row_local: ClassVar[bool] = True

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one input."""
        return (self.input,)

    def prepare(self, device: str) -> Callable[..., torch.Tensor]:
        """Multiply in fp32; the caller rounds."""
        return lambda start, stop, rows: rows.float() * self.factor


class ScaleParams(Params):
    """Parameters of `example-scale`."""

    factor: float = Field(gt=0, description="What the tensors are multiplied by.")
    ending: str = Field(".weight", description="Only tensors whose name ends so.")


class Scale(WeightSpace[ScaleParams]):
    """Multiplies tensors by a number."""

    name = "example-scale"
    summary = "Multiply tensors by a number."
    Params = ScaleParams

    def check(self, checkpoint: Checkpoint, params: ScaleParams) -> None:
        """Refuse a checkpoint without such tensors.

        Raises:
            Unsupported: none ends in `ending`.
        """
        if not any(name.endswith(params.ending) for name in checkpoint.specs):
            raise Unsupported("no tensor has this ending", found=params.ending, remedy="give another ending")

    def patch(self, checkpoint: Checkpoint, params: ScaleParams) -> Patch:
        """An edit for every such tensor."""
        names = [name for name in checkpoint.specs if name.endswith(params.ending)]
        edits = {name: Edit(checkpoint.specs[name], Multiply(name, params.factor)) for name in names}
        return Patch(
            edits=edits, json={"config.json": {"example_factor": params.factor}}, metrics={"scaled": len(edits)}
        )


class LetterParams(Params):
    """Parameters of `example-letters`."""

    data: str = Field(description="The letters to count.")


class Letters(Metric[LetterParams]):
    """Which of some letters the model's name has."""

    name = "example-letters"
    summary = "Share of letters that are in the checkpoint's name."
    figures = MappingProxyType({"share": "of the letters; higher is better"})
    Params = LetterParams

    def measure(self, subject: Loaded, params: LetterParams, measuring: Measuring) -> Measured:
        """One unit for each letter."""
        return Measured(
            {"share": Sample.mean({letter: float(letter in subject.checkpoint.label) for letter in params.data})}
        )


class Alias:
    """Opens `example:PATH` as the checkpoint at PATH."""

    name = "example"

    def accepts(self, reference: Reference) -> bool:
        """Whether the model begins with `example:`."""
        return reference.model.startswith("example:")

    def open(self, reference: Reference) -> Checkpoint:
        """The checkpoint behind the name."""
        opened = open_checkpoint(reference.folder / Path(reference.model.removeprefix("example:")))
        return replace(opened, label=reference.model, origin={"source": self.name})


@hookimpl
def regraft_transformations() -> list[type[Transformation[ScaleParams]]]:
    """Our transformation."""
    return [Scale]


@hookimpl
def regraft_metrics() -> list[type[Metric[LetterParams]]]:
    """Our metric."""
    return [Letters]


@hookimpl
def regraft_sources() -> list[Source]:
    """Our source."""
    return [Alias()]


@hookimpl
def regraft_architectures() -> list[Family]:
    """A family whose projections are called otherwise."""
    parts = (
        embedding("words", "embed_tokens"),
        linear("blocks.{layer}.query", q_proj="q_size"),
        linear("blocks.{layer}.key", k_proj="kv_size"),
        linear("blocks.{layer}.value", v_proj="kv_size"),
        linear("blocks.{layer}.out", columns="q_size", o_proj="hidden_size"),
        norm("last_norm", "final_norm"),
        head(),
    )
    return [Family(model_type="example_model", parts=parts)]


@hookimpl
def regraft_commands(app: typer.Typer) -> None:
    """Add `regraft example-count`."""

    @app.command("example-count")
    def count(model: str) -> None:
        """Count the tensors of MODEL."""
        print(len(open_checkpoint(model).specs))


@hookimpl
def regraft_before_step(step: str, checkpoint: Checkpoint) -> None:
    """Keep frozen models as they are."""
    if checkpoint.config.get("example_frozen"):
        raise ValueError(f"{checkpoint.label} is frozen, and {step} would change it")


@hookimpl
def regraft_after_step(step: str, checkpoint: Checkpoint, patch: Patch) -> None:
    """Keep every tensor of frozen parts."""
    lost = sorted(name for name in patch.removals if name.startswith("frozen."))
    if lost:
        raise ValueError(f"{step} takes {', '.join(lost)} out of {checkpoint.label}")
