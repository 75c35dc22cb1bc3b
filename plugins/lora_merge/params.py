"""Parameters of `lora-merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from regraft.core.transformation import Params


class LoraMergeParams(Params):
    """Which adapter, how much of it, and on what kind of base."""

    adapter: Path = Field(
        description="a PEFT adapter folder: adapter_config.json and adapter_model.safetensors",
    )
    scale: float = Field(
        1.0,
        allow_inf_nan=False,
        description="multiplies the adapter's own alpha / r; modules that the adapter replaces whole are not scaled",
    )
    quantized_base: Literal["refuse", "dequantize"] = Field(
        "refuse",
        description="what to do if the base was stored in 4 or 8 bits: refuse, or merge into its dequantised weights",
    )
    residual_base: bool = Field(
        False,
        description="the base already holds the residual weights of the adapter's PiSSA, OLoRA, CorDA, LoRA-GA or "
        "LoftQ initialisation; such adapters are refused otherwise",
    )
