"""What a training tells while it runs: a line now and then, a JSON log, TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from regraft.core.errors import ResourceError, UsageError


@dataclass(frozen=True)
class Progress:
    """One step, just done.

    Args:
        step: counted from 1.
        steps: how many there will be at most.
        loss: mean of the step, before its update.
        lr: learning rate of the step.
        gradient_norm: before clipping.
        tokens: seen since the start, over all sessions.
        tokens_per_second: of this session.
        eta_seconds: to the last step, at this session's pace.
        figures: what else the objective reports, such as `accuracy`.
    """

    step: int
    steps: int
    loss: float
    lr: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    eta_seconds: float
    figures: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        """`step 3/6  loss 2.310  1234 tokens/s  0:01:10 left`."""
        left = time.strftime("%H:%M:%S", time.gmtime(self.eta_seconds))
        figures = "".join(f"  {name} {value:.3g}" for name, value in self.figures.items())
        speed = f"{self.tokens_per_second:.0f} tokens/s"
        return f"step {self.step}/{self.steps}  loss {self.loss:.4g}{figures}  {speed}  {left} left"


Listener = Callable[[Progress], None]


class Sink(Protocol):
    """Something that keeps every step's figures."""

    def __call__(self, progress: Progress) -> None:
        """Take a step."""
        ...

    def close(self) -> None:
        """After the last step, or when the training failed."""
        ...


def telling(tell: Callable[[str], None], every_seconds: float = 5.0) -> Listener:
    """A listener that hands a line to `tell`, such as `Run.tell`: the first and the last step, and one now and then."""
    last = -every_seconds

    def listen(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.step == progress.steps or now - last >= every_seconds:
            last = now
            tell(str(progress))

    return listen


class JsonLog:
    """A line of JSON for each step, appended; steps that a resumed training does again are taken out first.

    Args:
        path: the file.
        done: steps that the training goes on from.

    Raises:
        ResourceError: it cannot be written.
    """

    def __init__(self, path: Path, done: int = 0) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(path) if _step(line) is not None and (_step(line) or 0) <= done]
            self.file = path.open("w")
            self.file.writelines(f"{line}\n" for line in (kept if done else []))
        except OSError as error:
            raise ResourceError(
                "the log cannot be written", where=path, found=error, remedy="choose another place for it"
            ) from None

    def __call__(self, progress: Progress) -> None:
        """Write a step, at once."""
        self.file.write(json.dumps(asdict(progress)) + "\n")
        self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoardLog:
    """Scalars of each step for TensorBoard.

    Args:
        folder: of the event files.
        done: steps that the training goes on from.

    Raises:
        UsageError: `tensorboard` is not installed.
    """

    def __init__(self, folder: Path, done: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "this log needs tensorboard, which is not installed",
                where=folder,
                remedy="pip install 'regraft[tensorboard]', or use the JSON log",
            ) from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=done + 1 if done else None)

    def __call__(self, progress: Progress) -> None:
        """Write a step."""
        values = {"loss": progress.loss, "lr": progress.lr, "gradient_norm": progress.gradient_norm}
        values |= {"tokens_per_second": progress.tokens_per_second, **progress.figures}
        for name, value in values.items():
            self.writer.add_scalar(name, value, progress.step)

    def close(self) -> None:
        """Flush and close."""
        self.writer.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _step(line: str) -> int | None:
    """The step of a line; None for one that a killed process left incomplete."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None
