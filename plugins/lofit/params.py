"""Parameters of `lofit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from regraft.core.data.settings import Data
from regraft.core.layers import Layers
from regraft.core.offsets import HeadSite
from regraft.core.recipe.model import Size
from regraft.core.recipe.references import OutputPath
from regraft.core.transformation import Params

Task = Literal["sft", "dpo"]
Scoring = Literal["scale", "grad", "random", "file"]
Bake = Literal["auto", "keep-class", "sidecar-patch"]

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

DEFAULT_SHARE = 0.03


class ScaleStage(Params):
    """Stage 1: scales of all heads, learnt only to choose heads by them."""

    lr: Rate = Field(default=5e-3, description="Learning rate of the scales, which falls to 0 in a straight line.")
    l1: float = Field(
        default=5e-4,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the sum of all scales' absolute values in the loss.",
    )
    epochs: Count = Field(default=5, description="Passes over the data.")
    steps: Count | None = Field(default=None, description="End after so many steps, before the epochs do.")


class OffsetStage(Params):
    """Stage 2: offsets of the chosen heads, which are the result."""

    lr: Rate = Field(default=1e-2, description="Learning rate of the offsets, which falls to 0 in a straight line.")
    epochs: Count = Field(default=5, description="Passes over the data.")
    steps: Count | None = Field(default=None, description="End after so many steps, before the epochs do.")


class LofitParams(Params):
    """What is learnt from what, in how many heads, and how it gets into the checkpoint."""

    task: Task = Field(
        description="sft: cross-entropy of the answers' tokens, from prompts and completions or chats. dpo: direct "
        "preference optimisation, from preference pairs."
    )
    data: Data = Field(description="What to learn from: a file, several, or a table; see the page on training.")
    held_out: Data | None = Field(
        None, description="Data of the same kind, on which the loss is measured before and after."
    )
    heads: Count | Fraction | None = Field(
        None,
        description="How many heads learn: a number, or a fraction of all heads of the model. Default: 0.03 as in the "
        "paper; with scoring = file, all that the file names.",
    )
    layers: Layers = Field(
        "0-",
        description="Layers whose heads may be chosen: `12-` from layer 12 on, `12-20`, `-20`, one, or a list. They "
        "count from 0. Layers below the lowest chosen head run only once for every sequence.",
    )
    scoring: Scoring = Field(
        "scale",
        description="How heads are chosen. scale: by the norm of scales that are learnt first, as in the paper. grad: "
        "by the norm of the gradient of those scales at 0, in one pass over the data. random: any. file: as heads_file "
        "says.",
    )
    heads_file: Path | None = Field(
        None, description="scoring = file: a heads.json, such as another lofit step reports; the first ones are taken."
    )
    site: HeadSite = Field(
        "head",
        description="head: an offset for each query head. kv-group: one for all query heads that share a key-value "
        "head, which the bias of v_proj can take up; heads then count key-value heads.",
    )
    bake: Bake = Field(
        "auto",
        description="auto: offsets become biases; where the class has none there, the model is written as another "
        "stock class that has them (Qwen2, Mistral, Phi-3 as Llama or SmolLM3). keep-class: refuse instead. "
        "sidecar-patch: weights stay as they are; the offsets are only reported, as a file that `steer` reads.",
    )
    select: ScaleStage = Field(
        default_factory=lambda: ScaleStage(),
        description="Stage 1, for scoring = scale: { lr = 5e-3, l1 = 5e-4, epochs = 5, steps }.",
    )
    tune: OffsetStage = Field(
        default_factory=lambda: OffsetStage(), description="Stage 2: { lr = 1e-2, epochs = 5, steps }."
    )
    batch_size: Count = Field(8, description="Sequences, or pairs, of a step.")
    micro_batch: Count | None = Field(
        None, description="How many of them are computed at once; fewer take less memory. Default: all."
    )
    beta: Rate = Field(0.5, description="task = dpo: how far the model may go from the base; larger is nearer.")
    prefix_cache: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Run the layers below the lowest chosen head once for every sequence and keep what they give. "
        "auto: where that is possible within prefix_bytes.",
    )
    prefix_bytes: Size = Field(
        4_000_000_000,
        description="The most memory that the prefix cache takes, in bytes or as 4GB (10^9), 4GiB (2^30).",
    )
    frozen: Literal["float32", "bfloat16", "nf4", "int8"] = Field(
        "float32",
        description="How the model's own weights are held while the offsets learn: nf4 and int8 in bitsandbytes form. "
        "The checkpoint's weights are the same in the end, and offsets are baked with them.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="What products are computed in; auto takes bfloat16 where the device is fast at it."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, more time."
    )
    save_every: Count = Field(
        100, description="Steps between two saved states, from which a run that was killed goes on."
    )
    log: OutputPath | None = Field(
        None, description="A file of JSON lines, one for each step of stage 2; stage 1 goes to `-select` beside it."
    )
    tensorboard: OutputPath | None = Field(
        None, description="A folder of TensorBoard events, one folder in it a stage."
    )

    @model_validator(mode="after")
    def _keys_that_go_together(self) -> Self:
        if (self.scoring == "file") != (self.heads_file is not None):
            raise ValueError('heads_file and scoring = "file" need each other')
        if self.scoring != "scale" and "select" in self.model_fields_set:
            raise ValueError('select is for scoring = "scale"')
        if self.frozen == "bfloat16" and self.precision == "float32":
            raise ValueError('frozen = "bfloat16" needs precision = "bfloat16", or "auto"')
        return self
