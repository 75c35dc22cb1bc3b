"""The training loop: steps in, weights changed in place, a report out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from regraft.core.errors import InputError, TransformationError, Unsupported, UsageError
from regraft.core.training.model import memory, switch_gradient_checkpointing
from regraft.core.training.modes import computing, reproducible, resolve_precision, step_seed, without_dropout
from regraft.core.training.objectives import Objective
from regraft.core.training.optimisers import make_optimizer
from regraft.core.training.progress import JsonLog, Listener, Progress, Sink, TensorBoardLog
from regraft.core.training.schedules import rate_share
from regraft.core.training.settings import TrainSettings
from regraft.core.training.state import ANEW, State, StateFolder, load_optimizer, optimizer_state
from regraft.core.training.weights import Average, Trainable, Weights

_PLACES = 8


class Piece(Protocol):
    """A part of a step that is computed at once; `core.data.batches.Batch` is one."""

    @property
    def indices(self) -> Sequence[int]:
        """Which examples."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens, for the speed."""
        ...


class Steps(Protocol):
    """The data of each step, by its number; `core.data.batches.Batches` is one."""

    @property
    def rank(self) -> int:
        """This process."""
        ...

    @property
    def world(self) -> int:
        """How many processes there are."""
        ...

    def __len__(self) -> int:
        """Number of steps."""
        ...

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        ...

    def units(self, step: int) -> int:
        """What the step's summed loss is divided by."""
        ...

    def micro(self, step: int, device: str) -> Sequence[Any]:
        """The step's pieces."""
        ...

    def places(self, indices: Sequence[int]) -> Sequence[object]:
        """Where examples come from, for messages."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What decides the steps; JSON values."""
        ...


@dataclass(frozen=True)
class Records:
    """What a training leaves on the disk, and whom it tells.

    Args:
        state: folder of the saved state; a run that finds one goes on from it.
        identity: what else decides the result, such as the base's digest; a state with another one is refused.
        log: file of JSON lines.
        tensorboard: folder of TensorBoard events.
        listen: called after every step.
    """

    state: Path | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    log: Path | None = None
    tensorboard: Path | None = None
    listen: Listener | None = None


@dataclass(frozen=True)
class Report:
    """What a training did.

    Args:
        losses: of every step, before its update.
        steps: done, over all sessions.
        planned: steps that the data would have given.
        tokens: seen.
        seconds: of this session.
        resumed: steps that were done before this session.
        stopped: why it ended early: `stop_loss`, or nothing.
        precision: in which it computed.
    """

    losses: tuple[float, ...]
    steps: int
    planned: int
    tokens: int
    seconds: float
    resumed: int
    stopped: str
    precision: str

    @property
    def final_loss(self) -> float:
        """Loss of the last step."""
        return self.losses[-1] if self.losses else math.nan


def train(
    model: Any,
    batches: Steps,
    settings: TrainSettings,
    objective: Objective,
    trainable: Mapping[str, Trainable],
    *,
    penalty: Callable[[], torch.Tensor] | None = None,
    records: Records | None = None,
) -> Report:
    """Minimise `objective` over `batches`; the weights are changed in place and end in eval mode, asking no gradient.

    A step's loss is the sum over its pieces divided by the step's units, plus the penalty: so two pieces of four are
    one of eight. The same seed, settings and device give the same bytes, interrupted or not.

    Args:
        model: the module that the objective runs.
        batches: the steps.
        settings: rates, optimiser, precision.
        objective: the loss of a piece.
        trainable: what learns, by name; everything else is frozen.
        penalty: added to the loss of every step, such as λ·Σ|A|.
        records: saved state, logs, listener.

    Raises:
        TransformationError: the loss or its gradient is not finite; names the rows, and the last good state is kept.
        UsageError: nothing learns; the saved state belongs to another recipe; a log needs what is not installed.
        Unsupported: the precision or the optimiser is none for this device or these weights.
        ResourceError: out of memory, or a record cannot be written.
        InputError: the saved state is damaged.
    """
    if not trainable:
        raise UsageError("nothing is to learn", where="trainable", expected="at least one parameter")
    if batches.world > 1:
        raise Unsupported(
            "one process trains", where="world", expected=1, found=batches.world, remedy="run without torchrun"
        )
    device = next(iter(trainable.values())).parameter.device
    precision = resolve_precision(settings.precision, str(device))
    with ExitStack() as stack:
        stack.enter_context(reproducible(device))
        stack.enter_context(_learning(model, settings))
        weights = Weights(trainable, masters=settings.master_weights)
        stack.callback(weights.clear)
        stack.enter_context(memory("training"))
        session = _Session(batches, settings, objective, weights, penalty, records or Records(), precision, device)
        stack.callback(session.close)
        return session.run()


@contextmanager
def _learning(model: Any, settings: TrainSettings) -> Iterator[None]:
    """Only what is trainable asks for gradients; dropout as the settings say; afterwards eval mode."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with ExitStack() as stack:
        if not settings.dropout:
            stack.enter_context(without_dropout(model))
        if settings.gradient_checkpointing:
            switch_gradient_checkpointing(model)
        model.train()
        try:
            yield
        finally:
            model.eval()


class _Session:
    """One process's part of a training."""

    def __init__(
        self,
        batches: Steps,
        settings: TrainSettings,
        objective: Objective,
        weights: Weights,
        penalty: Callable[[], torch.Tensor] | None,
        records: Records,
        precision: str,
        device: torch.device,
    ) -> None:
        self.batches, self.settings, self.objective = batches, settings, objective
        self.weights, self.penalty, self.records = weights, penalty, records
        self.precision, self.device = precision, device
        self.folder = None if records.state is None else StateFolder(records.state, self._identity())
        self.optimizer = make_optimizer(settings, weights)
        self.average = None if settings.ema is None else Average(weights, settings.ema)
        self.step, self.tokens, self.losses, self.stopped = 0, 0, list[float](), ""
        self._resume()
        self.resumed, self.first_tokens, self.started = self.step, self.tokens, time.monotonic()
        self.sinks: list[Sink] = []
        if records.log is not None:
            self.sinks.append(JsonLog(records.log, self.step))
        if records.tensorboard is not None:
            self.sinks.append(TensorBoardLog(records.tensorboard, self.step))

    def run(self) -> Report:
        """All steps that are left."""
        while self.step < len(self.batches) and not self.stopped:
            self._one_step()
            if self._learnt_enough():
                self.stopped = "stop_loss"
            if self.step % self.settings.save_every == 0 or self.stopped or self.step == len(self.batches):
                self._save()
        if self.average is not None:
            self.weights.load(self.average.values)
        return Report(
            tuple(self.losses),
            self.step,
            len(self.batches),
            self.tokens,
            time.monotonic() - self.started,
            self.resumed,
            self.stopped,
            self.precision,
        )

    def close(self) -> None:
        """Close the logs."""
        for sink in self.sinks:
            sink.close()

    def _one_step(self) -> None:
        torch.manual_seed(step_seed(self.settings.seed, self.step, self.batches.rank))
        share = rate_share(
            self.step,
            len(self.batches),
            schedule=self.settings.schedule,
            warmup_steps=self.settings.warmup_steps,
            final=self.settings.final_lr,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * share
        loss, tokens, figures = self._gradients()
        norm = self._clip()
        if not math.isfinite(norm):
            self._fail("the gradient is not finite", norm, self._rows())
        self.optimizer.step()
        self.weights.write_back()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.weights)
        self.step += 1
        self.tokens += tokens
        self.losses.append(loss)
        self._tell(loss, share, norm, figures)

    def _gradients(self) -> tuple[float, int, dict[str, float]]:
        """Loss, tokens and figures of the step; its gradients are then with the weights."""
        units = self.batches.units(self.step)
        total, tokens, figures = 0.0, 0, dict[str, float]()
        for piece in self.batches.micro(self.step, str(self.device)):
            with computing(self.device.type, self.precision):
                summed, more = self.objective(piece)
            loss = summed / units
            self._backward(loss, piece.indices)
            total += loss.item()
            tokens += piece.tokens
            for name, value in more.items():
                figures[name] = figures.get(name, 0.0) + value.item() / units
        if self.penalty is not None:
            loss = self.penalty()
            self._backward(loss, ())
            total += loss.item()
        return total, tokens, figures

    def _backward(self, loss: torch.Tensor, indices: Sequence[int]) -> None:
        if not bool(torch.isfinite(loss)):
            self._fail("the loss is not finite", loss.item(), indices)
        loss.backward()  # type: ignore[no-untyped-call]
        self.weights.collect()

    def _clip(self) -> float:
        leaves = [leaf for leaf in self.weights.leaves.values() if leaf.grad is not None]
        longest = self.settings.clip_norm if self.settings.clip_norm is not None else math.inf
        return torch.nn.utils.clip_grad_norm_(leaves, longest).item()

    def _learnt_enough(self) -> bool:
        window = self.settings.stop_window or self.batches.per_epoch
        if self.settings.stop_loss is None or len(self.losses) < window:
            return False
        return sum(self.losses[-window:]) / window < self.settings.stop_loss

    def _tell(self, loss: float, share: float, norm: float, figures: Mapping[str, float]) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        left = (len(self.batches) - self.step) * seconds / (self.step - self.resumed)
        speed = (self.tokens - self.first_tokens) / seconds
        rate = self.settings.lr * share
        progress = Progress(self.step, len(self.batches), loss, rate, norm, self.tokens, speed, left, figures)
        if self.step % self.settings.log_every == 0 or self.step == len(self.batches):
            for sink in self.sinks:
                sink(progress)
        if self.records.listen is not None:
            self.records.listen(progress)

    def _rows(self) -> Sequence[int]:
        return [one for piece in self.batches.micro(self.step, "cpu") for one in piece.indices]

    def _fail(self, message: str, found: float, indices: Sequence[int]) -> None:
        rows = [str(place) for place in self.batches.places(indices)]
        shown = ", ".join(rows[:_PLACES]) + (f" and {len(rows) - _PLACES} more" if len(rows) > _PLACES else "")
        good = self.weights.finite()
        if good:
            self._save()
        kept = f"; the weights after step {self.step} are kept in {self.records.state}" if self.folder and good else ""
        raise TransformationError(
            message,
            where=f"step {self.step + 1}" + (f", rows {shown}" if rows else ", in the penalty"),
            expected="a finite number",
            found=f"{found}{kept}",
            remedy="lower lr, set clip_norm, or look at these rows",
        )

    def _save(self) -> None:
        if self.folder is not None and self.batches.rank == 0:
            average = {} if self.average is None else self.average.values
            optimizer = optimizer_state(self.optimizer)
            losses = tuple(self.losses)
            leaves = self.weights.leaves
            self.folder.save(State(self.step, losses, self.tokens, leaves, average, optimizer, self.stopped))

    def _resume(self) -> None:
        state = None if self.folder is None else self.folder.load()
        if state is None:
            return
        self.step, self.tokens, self.losses, self.stopped = state.step, state.tokens, list(state.losses), state.stopped
        try:
            self.weights.load(state.weights)
            load_optimizer(self.optimizer, state.optimizer)
            if self.average is not None:
                self.average.load(state.average)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError("the saved state is damaged", where=self.records.state, found=error, remedy=ANEW) from None

    def _identity(self) -> dict[str, Any]:
        return {
            "settings": self.settings.identity(),
            "batches": dict(self.batches.identity()),
            "objective": dict(self.objective.identity()),
            "trainable": {name: one.identity() for name, one in self.weights.trainable.items()},
            "start": self.weights.digest(),
            "precision": self.precision,
            "recipe": dict(self.records.identity),
        }
