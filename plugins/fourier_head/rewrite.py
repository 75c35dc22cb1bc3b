"""Plan and apply: which tensors the head has, known from headers, and their values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.load import check_sources
from regraft.core.errors import InputError
from regraft.core.operations import Operation, RowFunction, Value
from regraft.core.patch import Edit, Outline, Patch, overlay
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from regraft.core.training.footprint import shared_bytes, state_bytes, training_bytes
from regraft.core.training.whole import learnable, refuse_quantised
from regraft.core.transformation import Run
from regraft.plugins.fourier_head.adapters import places
from regraft.plugins.fourier_head.export import Aim, without_tensors
from regraft.plugins.fourier_head.params import FourierHeadParams, LearnSettings
from regraft.plugins.fourier_head.series import check_window

if TYPE_CHECKING:
    import torch

HEAD = "lm_head"
TOKENS = 512
"""Of a sequence, for the memory that the plan names where `max_tokens` does not say."""

_ORDINAL = 0.5
_WEIGHTS = {"head": "the head", "lora": "the head, and adapters of queries and values", "full": "all weights"}


@dataclass(frozen=True)
class KeptRows(Operation):
    """The rows of a tensor without start .. stop, which may lie beyond its end.

    Args:
        input: its name.
        start, stop: what goes.
    """

    input: str
    start: int
    stop: int
    row_local = False

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one input."""
        return (self.input,)

    def prepare(self, device: str) -> RowFunction:
        """Cut and join."""
        import torch

        del device
        return lambda start, stop, rows: torch.cat([rows[: self.start], rows[self.stop :]])[start:stop]


@dataclass(frozen=True)
class PutRows(Operation):
    """A tensor with new rows from `start` on, in place of its own or behind them.

    Args:
        input: its name.
        rows: [n, ...].
        start: where they go, at most its number of rows.
    """

    input: str
    rows: MemoryTensor
    start: int
    row_local = False

    @property
    def inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one input."""
        return (self.input,)

    @property
    def operands(self) -> Mapping[str, MemoryTensor]:
        """The rows."""
        return {"rows": self.rows}

    def prepare(self, device: str) -> RowFunction:
        """Cut and join."""
        import torch

        new = self.rows.load(device)

        def put(start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
            after = rows[self.start + len(new) :]
            return torch.cat([rows[: self.start].float(), new.float(), after.float()])[start:stop]

        return put


def check(checkpoint: Checkpoint, params: FourierHeadParams) -> None:
    """Refuse what headers, config, tokenizer and parameters show to be impossible; see `FourierHead.check`."""
    Aim.of(checkpoint, params)
    if params.weights is not None and not params.weights.is_file():
        raise InputError("there is no such file", where=f"weights: {params.weights}", remedy="check the path")
    for learn in (params.calibrate, params.train):
        if learn is not None:
            refuse_quantised(checkpoint)
            check_sources(learn.data)
    if params.series is not None:
        check_window(checkpoint, params.series)


def head_specs(checkpoint: Checkpoint, aim: Aim, params: FourierHeadParams) -> dict[str, TensorSpec]:
    """Tensors that the step writes before any training, by name."""
    source, hidden = checkpoint.specs[aim.head], aim.architecture.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    if aim.bins.appended:
        shapes[aim.embeddings] = (aim.bins.vocab_size, hidden)
    if params.mode == "hybrid" and not aim.tied:
        shapes[f"{HEAD}.weight"] = (aim.bins.vocab_size - aim.bins.count, hidden)
    if params.mode == "hybrid" and params.gate == "linear":
        shapes |= {f"{HEAD}.gate.weight": (1, hidden), f"{HEAD}.gate.bias": (1,)}
    elif params.mode == "hybrid" and not aim.tied:
        shapes[f"{HEAD}.gate.weight"] = (aim.bins.count, hidden)
    width = 2 * (params.num_frequencies + 1)
    shapes |= {f"{HEAD}.fourier.weight": (width, hidden), f"{HEAD}.fourier.bias": (width,)}
    return {name: TensorSpec(name, source.dtype, shape) for name, shape in shapes.items()}


def outline(checkpoint: Checkpoint, params: FourierHeadParams) -> Outline:
    """The head's tensors; with a full training every floating-point tensor.

    Raises:
        RegraftError: as `Aim.of`.
    """
    aim = Aim.of(checkpoint, params)
    patch = without_tensors(checkpoint, aim, params)
    specs = head_specs(checkpoint, aim, params)
    notes, disk = list(_notes(aim, params)), 0
    memory = apart = 4 * (checkpoint.specs[aim.head].nbytes + checkpoint.specs[aim.embeddings].nbytes)
    for name in ("calibrate", "train"):
        learn: LearnSettings | None = getattr(params, name)
        if learn is None:
            continue
        if learn.weights == "full":
            kept = {key: spec for key, spec in checkpoint.specs.items() if key not in patch.removals}
            specs = {key: spec for key, spec in learnable(checkpoint).items() if key in kept} | specs
        elif learn.weights == "lora":
            specs = {key: checkpoint.specs[key] for key in places(aim.architecture)} | specs
        size = learn.data.max_tokens or TOKENS
        if params.series is not None and name == "train":
            size = params.series.context + params.series.horizon
        tokens = (learn.micro_batch or learn.batch_size) * size
        own = specs if learn.weights == "full" else {key: spec for key, spec in specs.items() if key in _learnt(specs)}
        trained = sum(math.prod(spec.shape) for spec in own.values())
        if learn.weights == "lora":
            trained += sum(learn.rank * sum(checkpoint.specs[key].shape) for key in places(aim.architecture))
        needed = training_bytes(checkpoint, trained, tokens=tokens)
        memory = max(memory, needed)
        apart = max(apart, needed - (shared_bytes(trained) if learn.weights == "full" else 0))
        disk = max(disk, state_bytes(trained))
        notes.append(f"{name}: {_WEIGHTS[learn.weights]}, at most {learn.epochs} epochs, lr {learn.lr:g}")
    return replace(Outline.of(patch), specs=specs, notes=tuple(notes), workspace_bytes=memory,
                   shared_bytes=memory - apart, scratch_bytes=disk)  # fmt: skip


def make_patch(checkpoint: Checkpoint, params: FourierHeadParams, run: Run) -> Patch:
    """The patch with its values, before any training.

    Raises:
        RegraftError: as `Aim.of`; a file of weights does not fit.
    """
    from regraft.plugins.fourier_head.values import head_values

    aim = Aim.of(checkpoint, params)
    specs = head_specs(checkpoint, aim, params)
    made = head_values(checkpoint, aim, params, run)
    edits = {name: Edit(specs[name], Value(MemoryTensor(name, tensor))) for name, tensor in made.tensors.items()}
    if f"{HEAD}.weight" in specs:
        edits[f"{HEAD}.weight"] = Edit(specs[f"{HEAD}.weight"], KeptRows(aim.head, aim.bins.start, aim.bins.stop))
    if made.embeddings is not None:
        rows = MemoryTensor("rows", made.embeddings)
        edits[aim.embeddings] = Edit(specs[aim.embeddings], PutRows(aim.embeddings, rows, aim.bins.start))
    notes = list(_notes(aim, params))
    if made.explained is not None and made.explained < _ORDINAL:
        notes.append(
            f"{params.num_frequencies} frequencies follow {made.explained:.0%} of what tells the bins' rows apart: "
            "neighbours are hardly alike, so expect to train"
        )
    figures: dict[str, Any] = {"bins": aim.bins.count, "start": aim.bins.start, "frequencies": params.num_frequencies}
    if made.explained is not None:
        figures["rows_followed"] = round(made.explained, 6)
    before, after = _head_numbers(checkpoint, aim, specs)
    figures |= {"head_parameters_before": before, "head_parameters_after": after}
    patch = without_tensors(checkpoint, aim, params)
    return replace(patch, edits={name: edits[name] for name in specs}, metrics=figures, notes=tuple(notes))


def apply(checkpoint: Checkpoint, params: FourierHeadParams, run: Run) -> Patch:
    """The patch, trained where that is asked for.

    Raises:
        RegraftError: as `make_patch`, and as the training.
    """
    patch = make_patch(checkpoint, params, run)
    if params.calibrate is None and params.train is None:
        return patch
    from regraft.plugins.fourier_head.fit import fit

    return fit(checkpoint, overlay(checkpoint, patch, by=run.step), patch, params, run)


def _learnt(specs: Mapping[str, TensorSpec]) -> set[str]:
    """Names of what is trained when the head alone learns."""
    return {name for name in specs if name.startswith((f"{HEAD}.fourier.", f"{HEAD}.gate."))}


def _head_numbers(checkpoint: Checkpoint, aim: Aim, specs: Mapping[str, TensorSpec]) -> tuple[int, int]:
    """Parameters of the head of its own, before and after; rows that it shares with the embeddings are not its own."""
    own = 0 if aim.head == aim.embeddings else math.prod(checkpoint.specs[aim.head].shape)
    return own, sum(math.prod(spec.shape) for name, spec in specs.items() if name.startswith(HEAD))


def _notes(aim: Aim, params: FourierHeadParams) -> tuple[str, ...]:
    bins = aim.bins
    new = "new tokens " if bins.appended else "tokens "
    ends = f" ({bins.texts[0]!r} to {bins.texts[-1]!r})" if bins.texts and bins.texts[0] and bins.texts[-1] else ""
    notes = [
        (
            f"{new}{bins.start} to {bins.stop - 1}{ends} are {bins.count} bins of a density with "
            f"{params.num_frequencies} frequencies"
        ),
        "load with trust_remote_code=True; without it transformers refuses, since it does not know the model type",
    ]
    if params.mode == "replace":
        notes.append("every token is a bin, the special ones too: they lie on the axis with the others")
    if aim.architecture.tie_word_embeddings and not aim.tied:
        notes.append("the head was tied to the embeddings and no longer is")
    return tuple(notes)
