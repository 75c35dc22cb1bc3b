"""Parameters of `vlora-train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.settings import Data
from regraft.core.recipe.references import ModelReference, OutputPath
from regraft.core.training.settings import EpochOptions
from regraft.core.transformation import Params

Count = Annotated[int, Field(ge=1)]
Stage = Literal["generator", "both"]
Frozen = Literal["float32", "bfloat16", "nf4", "int8"]

_RATES = {"generator": 5e-5, "both": 2e-5}
_BATCHES = {"generator": 768, "both": 128}


class NewGenerator(Params):
    """Sizes of a new generator; those of the language model's side follow from the checkpoint.

    Args:
        dim: its width; a multiple of `heads`.
        depth: blocks of each sub-generator.
        heads: attention heads of a block.
        ffn_ratio: width of a block's feed-forward, in `dim`.
        rank: of every delta.
        alpha: deltas are multiplied by alpha / rank; None means rank.
        types: which weights get deltas: some of q, k, v, o, and m, a path beside the whole MLP; None takes all that
            `vlora` can merge into this model.
        every: k; layers k-1, 2k-1, ..., from 0, get deltas.
        separate: a sub-generator for each type, or one for all.
    """

    dim: Count = 512
    depth: Count = 8
    heads: Count = 16
    ffn_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    rank: Count = 64
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    types: Annotated[str, Field(min_length=1)] | None = None
    every: Count = 4
    separate: bool = True


class VloraLearning(EpochOptions):
    """What else decides how weights learn."""

    schedule: Literal["constant", "linear", "cosine"] = "cosine"


class VloraTrainParams(Params):
    """What learns to see, from what, and how long."""

    data: Data = Field(
        description="Image-text rows: a prompt with its answer, or messages, and `image`, a path, or `features`, the "
        "name of a tensor. A file, several, a folder, or a table with `source` and how rows are read. Rows with "
        "neither are text alone. Only answers are learnt."
    )
    held_out: Data | None = Field(None, description="Rows of the same kind: their loss is measured before and after.")
    images: Path | None = Field(
        None, description="Folder at which the paths of images start. Default: that of the data file."
    )
    placeholder: str = Field(
        "<image>",
        description="Stands for the image in the texts of other data sets: it is removed, with a line break beside it.",
    )
    vision: ModelReference | None = Field(
        None,
        description="The frozen vision encoder, CLIP or SigLIP: a folder or a hub id. Default: the one that the "
        "generator was trained with. Not needed for features.",
    )
    select_layer: int | None = Field(
        None, description="Which of its hidden states are the features. Default: the generator's; of a new one -2."
    )
    features: Path | None = Field(
        None, description="A .safetensors file with features [patches, width] by the names that rows give."
    )
    train: Stage = Field(
        "generator", description="generator: the first stage, the language model is frozen. both: the second stage."
    )
    generator: Path | None = Field(
        None,
        description="Folder of the generator to go on with. Default: that of an earlier step of this recipe; without "
        "one, or with `new`, a new one.",
    )
    new: NewGenerator | None = Field(
        None,
        description="Sizes of a new generator: { dim, depth, heads, ffn_ratio, rank, alpha, types, every, separate }.",
    )
    frozen: Frozen = Field(
        "float32", description='train = "generator": how the weights of the language model are held meanwhile.'
    )
    lr: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="Peak of the learning rate. Default: 5e-5, for both 2e-5."
    )
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.03, description="Share of the steps over which the rate grows to its peak."
    )
    epochs: Count = Field(1, description="Passes over the data.")
    steps: Count | None = Field(None, description="End after so many steps, before the epochs do.")
    batch_size: Count | None = Field(None, description="Rows of a step. Default: 768, for both 128.")
    micro_batch: Count = Field(8, description="How many of them a process computes at once.")
    learning: VloraLearning = Field(
        default_factory=VloraLearning,
        description="The rest: { optimizer, betas, eps, weight_decay, schedule, warmup_steps, final_lr, clip_norm, "
        "precision, stop_loss, stop_window, dropout, gradient_checkpointing, spam, shuffle, drop_last, log_every, "
        "save_every }.",
    )
    log: OutputPath | None = Field(None, description="A file that gets a line of JSON for each step.")
    tensorboard: OutputPath | None = Field(None, description="A folder that gets TensorBoard events.")

    @property
    def rate(self) -> float:
        """The peak of the learning rate."""
        return _RATES[self.train] if self.lr is None else self.lr

    @property
    def rows(self) -> int:
        """Rows of a step."""
        return self.batch_size or _BATCHES[self.train]

    @model_validator(mode="after")
    def _what_learns(self) -> Self:
        if self.generator is not None and self.new is not None:
            raise ValueError("generator and new exclude each other: one goes on, the other begins anew")
        if self.frozen != "float32" and self.train == "both":
            raise ValueError('frozen is for train = "generator": both learn in float32')
        if "warmup_steps" in self.learning.model_fields_set and "warmup" in self.model_fields_set:
            raise ValueError("warmup and learning.warmup_steps say the same: give one of them")
        return self

    @model_validator(mode="after")
    def _what_is_learnt(self) -> Self:
        for key, settings in (("data", self.data), ("held_out", self.held_out)):
            if settings is None:
                continue
            if settings.kind not in (None, "completion", "chat"):
                raise ValueError(f'{key}.kind: rows with answers are "completion" or "chat"')
            if settings.learn != "answer":
                raise ValueError(f"{key}.learn: only answers are learnt")
            if settings.pack:
                raise ValueError(f"{key}.pack: a sequence has one picture, so rows cannot be packed")
        return self
