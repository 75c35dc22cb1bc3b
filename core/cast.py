"""`[output] dtype`: every floating-point tensor in one dtype, and a config that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.operations import Convert
from regraft.core.patch import Edit, Patch
from regraft.core.specs import CODE_OF_NAME, FLOAT_CODES

_KEYS = ("torch_dtype", "dtype")


def cast_patch(checkpoint: Checkpoint, dtype: str) -> Patch:
    """The patch that stores every float16, bfloat16, float32 and float64 tensor as `dtype`, rounded once.

    Args:
        checkpoint: what is cast.
        dtype: `bfloat16`, `float16` or `float32`.
    """
    code = CODE_OF_NAME[dtype]
    edits = {
        name: Edit(replace(spec, dtype=code), Convert(name))
        for name, spec in checkpoint.specs.items()
        if spec.dtype in FLOAT_CODES and spec.dtype != code
    }
    return Patch(edits=edits, json={CONFIG: _config_change(checkpoint.config, dtype)})


def _config_change(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The dtype under whichever key the config has it, in the configs of its parts (`text_config`) too."""
    change: dict[str, Any] = dict.fromkeys([key for key in _KEYS if key in config] or ["dtype"], dtype)
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, Mapping) and any(key in part for key in _KEYS):
            change[name] = dict.fromkeys([key for key in _KEYS if key in part], dtype)
    return change
