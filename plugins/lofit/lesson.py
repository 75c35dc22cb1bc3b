"""What both stages share: the model, the data, and the loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from regraft.core.architectures import Architecture
from regraft.core.checkpoint import Checkpoint
from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.load import Dataset, load_data
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.training.head import Head
from regraft.core.training.loop import Records
from regraft.core.training.measured import held_out_sums
from regraft.core.training.model import window_of
from regraft.core.training.modes import resolve_precision
from regraft.core.training.objectives import CrossEntropy, Dpo, Objective, ReferencePass
from regraft.core.training.progress import telling
from regraft.core.training.settings import TrainSettings
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.transformation import Run
from regraft.plugins.lofit.params import LofitParams, OffsetStage, ScaleStage


@dataclass
class Lesson:
    """One step's model and data.

    Args:
        checkpoint: as it stands at the step.
        architecture: its roles.
        params: of the step.
        run: the run.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    params: LofitParams
    run: Run
    model: Any = field(init=False)
    head: Head = field(init=False)
    data: Dataset = field(init=False)
    held_out: Dataset | None = field(init=False, default=None)
    _reference: torch.Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Load all of it.

        Raises:
            InputError, UsageError, Unsupported, ResourceError: as model, tokenizer and data are read; or the data is
                of another kind than the task asks for, or less than a batch.
        """
        refuse_untrusted_code(self.checkpoint, trust=self.run.trust)
        self.precision = resolve_precision(self.params.precision, self.run.device)
        self.model = self.run.model(self.checkpoint, **self._held())
        tokenizer = self.run.tokenizer(self.checkpoint)
        self.data = self._load("data", self.params.data, tokenizer)
        if self.params.held_out is not None:
            self.held_out = self._load("held_out", self.params.held_out, tokenizer)
        if len(self.data.examples) < self.params.batch_size:
            raise InputError(
                "there are fewer sequences than a batch takes",
                where="data",
                expected=f"at least {self.params.batch_size}",
                found=len(self.data.examples),
                remedy="give more data, or a smaller batch_size",
            )
        self.head = Head.of(self.model)

    @property
    def device(self) -> str:
        """The model's."""
        return str(next(self.model.parameters()).device)

    def batches(self, stage: str, given: ScaleStage | OffsetStage) -> Batches:
        """The steps of a stage: the last batch of an epoch may be smaller, as in the paper's code."""
        settings = BatchSettings(
            batch_size=self.params.batch_size,
            micro_batch=self.params.micro_batch,
            epochs=given.epochs,
            steps=given.steps,
            drop_last=False,
        )
        seed = self.run.seed_for(f"{stage} order")
        return Batches(self.data.examples, settings, seed, self.run.rank, self.run.world)

    def settings(self, stage: str, given: ScaleStage | OffsetStage) -> TrainSettings:
        """AdamW without decay, a rate that falls to 0 in a straight line, gradients no longer than 1: the paper's."""
        return TrainSettings(
            lr=given.lr,
            schedule="linear",
            precision=self.params.precision,
            gradient_checkpointing=self.params.gradient_checkpointing,
            save_every=self.params.save_every,
            seed=self.run.seed_for(f"{stage} steps"),
        )

    def records(self, stage: str, **identity: Any) -> Records:
        """Where a stage keeps its state and its logs."""
        own = self.params
        log = own.log if own.log is None or stage == "tune" else own.log.with_stem(f"{own.log.stem}-{stage}")
        return Records(
            state=self._state(stage),
            identity={"checkpoint": self.checkpoint.digest, "site": own.site, "frozen": own.frozen, **identity},
            log=log,
            tensorboard=None if own.tensorboard is None else own.tensorboard / stage,
            listen=telling(self.run.tell),
        )

    def objective(self, head: Head) -> Objective:
        """The task's loss, from the model's losses as `head` computes them. No adapter may be attached at this call:
        the reference of DPO is the model as it is.
        """
        if self.params.task == "sft":
            return CrossEntropy(head)
        if self._reference is None:
            self._reference = self._log_probs(head, self.batches("tune", self.params.tune), "reference")
        return Dpo(head, self._reference, self.params.beta)

    def judge(self) -> Judge | None:
        """Measures the loss on held-out data; None where there is none. No adapter may be attached at this call."""
        if self.held_out is None:
            return None
        size = min(self.params.batch_size, len(self.held_out.examples))
        settings = BatchSettings(batch_size=size, micro_batch=self.params.micro_batch, shuffle=False, drop_last=False)
        batches = Batches(self.held_out.examples, settings)
        if self.params.task == "sft":
            return Judge(self, batches, CrossEntropy(self.head))
        reference = self._log_probs(self.head, batches, "held-out")
        return Judge(self, batches, Dpo(self.head, reference, self.params.beta))

    def _log_probs(self, head: Head, batches: Batches, name: str) -> torch.Tensor:
        state = self._state("reference")
        cache = None if state is None or self.run.rank else state / f"{name}.safetensors"
        identity = {"checkpoint": self.checkpoint.digest, "frozen": self.params.frozen}
        return ReferencePass(head, batches, self.precision, cache, identity).log_probs()

    def _state(self, name: str) -> Path | None:
        return None if self.run.state is None else self.run.state / name

    def _held(self) -> dict[str, Any]:
        """How the frozen weights are held, as `Run.model` takes it: in bfloat16 only under autocast, which keeps the
        residual stream and what is added to it in fp32.

        Raises:
            Unsupported: the weights are to be bfloat16, and products are not.
        """
        frozen = self.params.frozen
        if frozen == "bfloat16" and self.precision != "bfloat16":
            raise Unsupported(
                "weights that are held in bfloat16 compute in it, which this device does many times slower",
                where="frozen",
                found=self.run.device,
                remedy='use frozen = "float32"',
            )
        return {"dtype": frozen} if frozen in ("float32", "bfloat16") else {"quantize": frozen, "dtype": self.precision}

    def _load(self, key: str, settings: DataSettings, tokenizer: Any) -> Dataset:
        window = window_of(self.checkpoint, self.model)
        data = load_data(settings, tokenizer, window=window, seed=self.run.seed_for(key))
        pairs = Batches(data.examples, BatchSettings(batch_size=1)).pairs
        if pairs != (self.params.task == "dpo"):
            raise UsageError(
                "the data is of another kind than the task learns from",
                where=f"{key}: {', '.join(settings.sources)}",
                expected="preference pairs (chosen, rejected)" if not pairs else "prompts and completions, or chats",
                found="preference pairs" if pairs else "single answers",
                remedy='use task = "dpo"' if pairs else 'use task = "sft", or data with chosen and rejected answers',
            )
        return data


@dataclass(frozen=True)
class Judge:
    """The mean loss, and what else the task measures, over held-out data."""

    lesson: Lesson
    batches: Batches
    objective: Objective

    def __call__(self) -> dict[str, float]:
        """`loss`, and for dpo `accuracy` and `margin`."""
        sums, units = held_out_sums(self.objective, self.batches, self.lesson.device, self.lesson.precision)
        return {name: value / units for name, value in sums.items()}
