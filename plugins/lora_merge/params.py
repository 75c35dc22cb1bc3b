"""Parameters of `lora-merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from regraft.core.transformation import Params


class LoraMergeParams(Params):
    """Which adapter, how much of it, and on what kind of base."""

    adapter: Path = Field(
        description="A PEFT adapter folder: adapter_config.json and adapter_model.safetensors.",
    )
    scale: float = Field(
        1.0,
        allow_inf_nan=False,
        description="Multiplies the adapter's own alpha / r. What the adapter replaces whole is not scaled; "
        "a DoRA takes only 1.",
    )
    subtract: bool = Field(
        False,
        description="Take the adapter off again: a base into which it was merged becomes what it was, but for what "
        "rounding lost.",
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest",
        description="How bf16 and fp16 weights are rounded. stochastic: up or down by chance, as near as they are, by "
        "the recipe's seed; a delta too small for the dtype then arrives on average instead of not at all.",
    )
    residual_base: bool = Field(
        False,
        description="The base already holds the residual weights of the adapter's PiSSA, OLoRA, CorDA, LoRA-GA or "
        "LoftQ initialisation. Such adapters are refused otherwise.",
    )
