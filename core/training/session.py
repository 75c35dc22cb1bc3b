"""One process's part of a training: step by step, alone or with others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from regraft.core.errors import TransformationError, UsageError
from regraft.core.training.distributed import Group
from regraft.core.training.keeping import Keeper
from regraft.core.training.modes import computing, step_seed
from regraft.core.training.optimisers import make_optimizer
from regraft.core.training.progress import JsonLog, Progress, Sink, TensorBoardLog
from regraft.core.training.records import Records, Report
from regraft.core.training.schedules import rate_share
from regraft.core.training.settings import TrainSettings
from regraft.core.training.sharding import Compute
from regraft.core.training.state import StateFolder
from regraft.core.training.steps import Steps
from regraft.core.training.weights import Average, Weights

PLACES = 8
"""How many places a message names."""


@dataclass(frozen=True)
class _Fault:
    """What is not finite, and the examples behind it."""

    message: str
    found: float
    indices: list[int]


@dataclass
class _Part:
    """What one process has computed of a step; `asked` are the copies that have a gradient here."""

    loss: float = 0.0
    tokens: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    fault: _Fault | None = None


class Session:
    """One process's part of a training."""

    def __init__(
        self,
        batches: Steps,
        settings: TrainSettings,
        compute: Compute,
        weights: Weights,
        penalty: Callable[[], torch.Tensor] | None,
        records: Records,
        precision: str,
        device: torch.device,
        group: Group,
        identity: Mapping[str, Any] | None,
    ) -> None:
        self.batches, self.settings, self.compute = batches, settings, compute
        self.weights, self.penalty, self.records = weights, penalty, records
        self.precision, self.device, self.group = precision, device, group
        self.optimizer = make_optimizer(settings, weights)
        self.average = None if settings.ema is None else Average(weights, settings.ema)
        self.step, self.tokens, self.losses, self.stopped = 0, 0, list[float](), ""
        self.keeper: Keeper | None = None
        if records.state is not None and identity is not None:
            folder = StateFolder(records.state, identity)
            self.keeper = Keeper(folder, group, weights, self.optimizer, self.average)
            self._resume(self.keeper)
        self.resumed, self.first_tokens, self.started = self.step, self.tokens, time.monotonic()
        self.sinks: list[Sink] = []
        if records.log is not None and group.rank == 0:
            self.sinks.append(JsonLog(records.log, self.step))
        if records.tensorboard is not None and group.rank == 0:
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
        longest = self.settings.clip_norm
        norm = self.weights.clip(self.group, math.inf if longest is None else longest)
        if not math.isfinite(norm):
            self._fail(_Fault("the gradient is not finite", norm, self._rows()))
        self.optimizer.step()
        self.weights.write_back()
        self.weights.forget_gradients()
        if self.average is not None:
            self.average.update(self.weights)
        self.step += 1
        self.tokens += tokens
        self.losses.append(loss)
        self._tell(loss, share, norm, figures)

    def _gradients(self) -> tuple[float, int, dict[str, float]]:
        """Loss, tokens and figures of the step, over all processes; its gradients are then with the weights."""
        own = self._own_part()
        parts = self.group.gather(own)
        if fault := next((part.fault for part in parts if part.fault is not None), None):
            self._fail(fault)
        self.weights.add_up(self.group, (name for part in parts for name in part.asked))
        figures: dict[str, float] = {}
        for part in parts:
            for name, value in part.figures.items():
                figures[name] = figures.get(name, 0.0) + value
        return sum(part.loss for part in parts), sum(part.tokens for part in parts), figures

    def _own_part(self) -> _Part:
        """What this process computes of the step."""
        units, part = self.batches.units(self.step), _Part()
        for piece, counts in self._pieces():
            with computing(self.device.type, self.precision):
                summed, more = self.compute(piece)
            self._backward(summed / units if counts else summed * 0.0, piece.indices, part)
            if counts:
                part.tokens += piece.tokens
                for name, value in more.items():
                    part.figures[name] = part.figures.get(name, 0.0) + value.item() / units
        if self.penalty is not None and self.group.rank == 0:
            self._backward(self.penalty(), (), part)
        if self.group.world > 1:
            part.asked = [name for name, leaf in self.weights.copies.items() if leaf.grad is not None]
        return part

    def _pieces(self) -> list[tuple[Any, bool]]:
        """This process's pieces, and whether they count: where weights are shared out, all must run as many."""
        own = self.batches.micro(self.step, str(self.device))
        missing = max(self.group.gather(len(own))) - len(own) if self.weights.shards else 0
        return [*((piece, True) for piece in own), *((self._any_piece(own), False) for _ in range(missing))]

    def _any_piece(self, own: Sequence[Any]) -> Any:
        pieces = own or self.batches.micro(0, str(self.device))
        if not pieces:
            raise UsageError(
                "there is nothing for this process to compute",
                where="batch_size",
                expected=f"at least {self.group.world} sequences",
                remedy="give more data, or start fewer processes",
            )
        return pieces[0]

    def _backward(self, loss: torch.Tensor, indices: Sequence[int], part: _Part) -> None:
        """Add the loss and its gradients. Alone, stop where it is not finite; else the others wait for our part."""
        found = loss.item()
        if part.fault is None and not math.isfinite(found):
            part.fault = _Fault("the loss is not finite", found, list(indices))
            if self.group.world == 1:
                self._fail(part.fault)
        part.loss += found
        loss.backward()  # type: ignore[no-untyped-call]
        self.weights.collect()

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

    def _rows(self) -> list[int]:
        own = [one for piece in self.batches.micro(self.step, "cpu") for one in piece.indices]
        return [one for rows in self.group.gather(own) for one in rows]

    def _fail(self, fault: _Fault) -> None:
        rows = [str(place) for place in self.batches.places(fault.indices)]
        shown = ", ".join(rows[:PLACES]) + (f" and {len(rows) - PLACES} more" if len(rows) > PLACES else "")
        good = self.weights.finite(self.group)
        if good:
            self._save()
        kept = f"; the weights after step {self.step} are kept in {self.records.state}" if self.keeper and good else ""
        raise TransformationError(
            fault.message,
            where=f"step {self.step + 1}" + (f", rows {shown}" if rows else ", in the penalty"),
            expected="a finite number",
            found=f"{fault.found}{kept}",
            remedy="lower lr, set clip_norm, or look at these rows",
        )

    def _save(self) -> None:
        if self.keeper is not None:
            self.keeper.save(self.step, self.losses, self.tokens, self.stopped)

    def _resume(self, keeper: Keeper) -> None:
        state = keeper.bring_back()
        if state is not None:
            self.step, self.tokens = state.step, state.tokens
            self.losses, self.stopped = list(state.losses), state.stopped
