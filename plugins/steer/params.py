"""Parameters of `steer`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from regraft.core.transformation import Params


class SteerParams(Params):
    """Which vectors, and how much of them."""

    vectors: Path = Field(
        description="A safetensors file whose tensors say where they go: `layers.3.attn_out` and `layers.3.mlp_out` "
        "([hidden_size]), `layers.3.heads.0` and `layers.3.kv_groups.0` ([head_dim]). Layers and heads count from 0.",
    )
    strength: float = Field(1.0, allow_inf_nan=False, description="Multiplies every vector.")
    mode: Literal["auto", "keep-class"] = Field(
        "auto",
        description="auto: where the model's class has no bias in that place, write the model as another stock class "
        "that has one and computes the same (Qwen2, Mistral and Phi-3 as Llama or SmolLM3). keep-class: refuse.",
    )
