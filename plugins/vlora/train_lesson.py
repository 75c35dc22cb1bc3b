"""The data of a step, in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.settings import DataSettings
from regraft.core.training.measured import held_out_sums
from regraft.core.transformation import Run
from regraft.plugins.vlora.train_data import ShownBatches, ShownData, load_shown
from regraft.plugins.vlora.train_model import SeenAnswers
from regraft.plugins.vlora.train_params import VloraTrainParams
from regraft.plugins.vlora.train_pictures import Pictures


@dataclass(frozen=True)
class Lesson:
    """Rows with their pictures, and the steps in which they are learnt."""

    data: ShownData
    steps: ShownBatches

    def mean_loss(self, objective: SeenAnswers, device: str, precision: str) -> float:
        """The loss of a learnt token over all batches of an epoch, without learning."""
        with objective.attached.attached():
            sums, units = held_out_sums(objective, self.steps, device, precision)
        return sums["loss"] / units


@dataclass(frozen=True)
class Teacher:
    """Makes lessons of a recipe's data.

    Args:
        params: of the step.
        run: the run.
        tokenizer: of the language model.
        window: tokens that its positions allow.
        pictures: look at images before anything is learnt.
    """

    params: VloraTrainParams
    run: Run
    tokenizer: Any
    window: int
    pictures: Pictures

    def training(self) -> Lesson:
        """What is learnt.

        Raises:
            InputError, UsageError: as `load_shown`; or there are fewer rows than a batch.
        """
        params, run = self.params, self.run
        data = self._data("data", params.data)
        settings = BatchSettings(
            batch_size=params.rows,
            micro_batch=params.micro_batch,
            epochs=params.epochs,
            steps=params.steps,
            shuffle=params.learning.shuffle,
            drop_last=params.learning.drop_last,
        )
        batches = Batches(data.dataset.examples, settings, run.seed_for("order"), run.rank, run.world)
        return Lesson(data, ShownBatches(data, batches))

    def held_out(self) -> Lesson | None:
        """What the loss is measured on, whole in every process; None without such data. Raises as `training`."""
        if self.params.held_out is None:
            return None
        data = self._data("held_out", self.params.held_out)
        size = min(self.params.micro_batch, len(data.dataset.examples))
        batches = Batches(data.dataset.examples, BatchSettings(batch_size=size, shuffle=False, drop_last=False))
        return Lesson(data, ShownBatches(data, batches))

    def _data(self, key: str, settings: DataSettings) -> ShownData:
        return load_shown(
            settings,
            self.tokenizer,
            window=self.window,
            check=self.pictures.check,
            images=self.params.images,
            placeholder=self.params.placeholder,
            seed=self.run.seed_for(key),
        )
