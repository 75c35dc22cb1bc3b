"""The data of a step, in batches, with the loss that it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.examples import PreferenceExample
from regraft.core.data.load import Dataset, load_data
from regraft.core.data.settings import DataSettings
from regraft.core.errors import UsageError
from regraft.core.training.head import Head
from regraft.core.training.measured import held_out_sums
from regraft.core.training.model import memory
from regraft.core.training.modes import without_dropout
from regraft.core.training.objectives import CrossEntropy, Dpo, Objective, ReferencePass
from regraft.core.transformation import Run
from regraft.plugins.fine_tune.params import FineTuneParams


@dataclass(frozen=True)
class Lesson:
    """Data of one kind, with what its loss needs.

    Args:
        dataset: the sequences or pairs.
        batches: its steps.
        beta: of DPO.
        reference: log-probabilities of the pairs under the base; None where the loss is cross-entropy.
    """

    dataset: Dataset
    batches: Batches
    beta: float
    reference: torch.Tensor | None = None

    def objective(self, head: Head) -> Objective:
        """The loss of a batch, for the model of `head`."""
        return CrossEntropy(head) if self.reference is None else Dpo(head, self.reference, self.beta)

    def mean_loss(self, head: Head, device: str, precision: str) -> float:
        """The loss over all batches of an epoch, without learning."""
        with without_dropout(head.model):
            sums, units = held_out_sums(self.objective(head), self.batches, device, precision)
        return sums["loss"] / units


@dataclass(frozen=True)
class Teacher:
    """Makes lessons for one model.

    Args:
        params: of the step.
        run: the run.
        tokenizer: of the checkpoint.
        head: of the model before it learns.
        window: tokens that its positions allow.
        precision: in which it is computed.
    """

    params: FineTuneParams
    run: Run
    tokenizer: Any
    head: Head
    window: int
    precision: str

    def training(self) -> Lesson:
        """The steps of the training.

        Raises:
            InputError: the data cannot be read, is empty, or fewer than a batch.
            UsageError: no column fits, or the data is of another kind than the task asks for.
            Unsupported: the data has chats and the model no chat template.
        """
        params = self.params
        dataset = self._load("data", params.data)
        settings = BatchSettings(
            batch_size=params.batch_size,
            micro_batch=params.micro_batch,
            epochs=params.epochs,
            steps=params.steps,
            shuffle=params.train.shuffle,
            drop_last=params.train.drop_last,
        )
        run = self.run
        batches = Batches(dataset.examples, settings, run.seed_for("order"), run.rank, run.world)
        return self._lesson(dataset, batches)

    def held_out(self) -> Lesson | None:
        """Everything in its order, once; None if nothing is held out. Raises as `training`."""
        if self.params.held_out is None:
            return None
        dataset = self._load("held_out", self.params.held_out)
        settings = BatchSettings(
            batch_size=self.params.batch_size, micro_batch=self.params.micro_batch, shuffle=False, drop_last=False
        )
        return self._lesson(dataset, Batches(dataset.examples, settings))

    def _load(self, key: str, given: DataSettings) -> Dataset:
        settings = given.model_copy(update={"learn": "all" if self.params.task == "text" else "answer"})
        dataset = load_data(settings, self.tokenizer, window=self.window, seed=self.run.seed_for(key))
        pairs = isinstance(dataset.examples[0], PreferenceExample)
        if pairs != (self.params.task == "dpo"):
            raise UsageError(
                "the data is of another kind than the task asks for",
                where=f"{key}: {', '.join(given.sources)}",
                expected="preference pairs"
                if self.params.task == "dpo"
                else "texts, prompts with completions, or chats",
                found="preference pairs" if pairs else "no preference pairs",
                remedy='set task = "dpo"' if pairs else 'give rows with chosen and rejected, or task = "sft"',
            )
        if dataset.bad:
            self.run.tell(f"{key}: {len(dataset.bad)} rows skipped, such as {dataset.bad[0]}")
        return dataset

    def _lesson(self, dataset: Dataset, batches: Batches) -> Lesson:
        reference = None
        if self.params.task == "dpo":
            self.run.tell(f"log-probabilities of {len(dataset.examples)} pairs under the base")
            with memory("measuring the base"):
                reference = ReferencePass(self.head, batches, self.precision).log_probs()
        return Lesson(dataset, batches, self.params.beta, reference)
