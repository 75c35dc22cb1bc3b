"""`[output] dtype`: every floating-point tensor in one dtype, and a config that says so."""

from __future__ import annotations

from dataclasses import replace

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.operations import Convert
from regraft.core.patch import Edit, Patch
from regraft.core.specs import CODE_OF_NAME, FLOAT_CODES


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
    keys = [key for key in ("torch_dtype", "dtype") if key in checkpoint.config] or ["dtype"]
    return Patch(edits=edits, json={CONFIG: dict.fromkeys(keys, dtype)})
