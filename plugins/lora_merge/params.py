"""Parameters of `lora-merge`."""

from __future__ import annotations

from pathlib import Path

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
    residual_base: bool = Field(
        False,
        description="The base already holds the residual weights of the adapter's PiSSA, OLoRA, CorDA, LoRA-GA or "
        "LoftQ initialisation. Such adapters are refused otherwise.",
    )
