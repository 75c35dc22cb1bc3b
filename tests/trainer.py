"""A plugin that trains, for tests: in this process by `host_with(Trainer)`, in others by `installed(folder)`.

It learns a few random sequences. Environment variables, of which a saved state knows nothing, bring accidents:
`TRAINER_ACCIDENT`, such as `kill:3` (or `interrupt`, `raise`), hits the process `TRAINER_RANK` after that step of the
training of the recipe's step `TRAINER_STEP`.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from regraft import Checkpoint, FileRef, Outline, Params, Patch, Run, Transformation, TransformationError, hookimpl

NAME = "trainer"


class TrainerParams(Params):
    """What is learnt, and how."""

    lr: float = 1e-3
    steps: int = 6
    batch_size: int = 4
    samples: int = 8
    ema: float | None = None
    names: tuple[str, ...] | None = None


class Trainer(Transformation[TrainerParams]):
    """Fits a few random sequences."""

    name = NAME
    summary = "Fit a few random sequences."
    Params = TrainerParams

    def plan(self, checkpoint: Checkpoint, params: TrainerParams) -> Outline:
        """Every tensor, or those named."""
        names = params.names or tuple(checkpoint.specs)
        return Outline(specs={name: checkpoint.specs[name] for name in names})

    def apply(self, checkpoint: Checkpoint, params: TrainerParams, run: Run) -> Patch:
        """Train."""
        from regraft.core.data.batches import Batches, BatchSettings
        from regraft.core.training.head import Head
        from regraft.core.training.loop import Records, train
        from regraft.core.training.objectives import CrossEntropy
        from regraft.core.training.settings import TrainSettings
        from regraft.core.training.trained import trained_patch
        from regraft.core.training.weights import select

        model = run.model(checkpoint)
        settings = BatchSettings(batch_size=params.batch_size, epochs=params.steps, steps=params.steps)
        batches = Batches(_examples(checkpoint, params.samples), settings, 0, run.rank, run.world)
        state = run.state / "tune" if run.state else None
        records = Records(state=state, identity={"base": checkpoint.digest}, listen=lambda done: _listen(run, done))
        names = params.names or [name for name, _ in model.named_parameters()]
        report = train(
            model,
            batches,
            TrainSettings(lr=params.lr, precision="float32", ema=params.ema, save_every=2),
            CrossEntropy(Head.of(model)),
            select(model, params.names),
            records=records,
        )
        run.tell(f"went on from step {report.resumed}")
        patch = trained_patch(checkpoint, model, names)
        losses = "\n".join(map(repr, report.losses))
        return Patch(edits=patch.edits, metrics={"tokens": report.tokens},
                     reports={"losses.txt": FileRef(data=losses.encode())})  # fmt: skip


def _examples(checkpoint: Checkpoint, count: int) -> list[Any]:
    from regraft.core.data.examples import Example, ints
    from regraft.core.data.rows import Place

    draw, size = random.Random(0), min(128, checkpoint.config["vocab_size"])
    rows = [[draw.randrange(4, size) for _ in range(12)] for _ in range(count)]
    return [Example(ints(row), ints(row), Place("data.jsonl", number)) for number, row in enumerate(rows, 1)]


def _listen(run: Run, done: Any) -> None:
    run.tell(str(done))
    kind, _, step = os.environ.get("TRAINER_ACCIDENT", "none:0").partition(":")
    if done.step != int(step) or run.step != os.environ.get("TRAINER_STEP", NAME):
        return
    if run.rank != int(os.environ.get("TRAINER_RANK", "0")):
        _linger()
        return
    if kind == "raise":
        raise TransformationError("the trainer stumbles", where="the data", remedy="clear its way")
    os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGINT)


def _linger() -> None:
    """From now on this process is slow to see what stays of a run: torchrun's signal comes meanwhile."""
    from regraft.core.workspace import Workspace

    looks = Workspace.keeps_state.fget
    Workspace.keeps_state = property(lambda space: time.sleep(0.3) or looks(space))


@hookimpl
def regraft_transformations() -> list[type[Transformation[TrainerParams]]]:
    """The trainer."""
    return [Trainer]


def installed(folder: Path) -> dict[str, str]:
    """Put the plugin into `folder`, as pip would; the environment in which Python finds it."""
    information = folder / f"{NAME}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[regraft]\n{NAME} = {NAME}\n")
    shutil.copy(__file__, folder / f"{NAME}.py")
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
