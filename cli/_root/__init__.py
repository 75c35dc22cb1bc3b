"""regraft rewrites language-model checkpoints.

This module is the versioned API for plugin packages: import from here, and from nowhere below. Names are loaded on
first use, so that `import regraft` costs nothing and imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.core.architectures import Architecture, Family, Part, architecture_of, embedding, head, linear, norm
    from regraft.core.checkpoint import Checkpoint, FileRef
    from regraft.core.errors import (
        InputError,
        PluginError,
        RegraftError,
        ResourceError,
        TransformationError,
        Unsupported,
        UsageError,
        VerificationError,
    )
    from regraft.core.evaluate.metric import Measured, Measuring, Metric
    from regraft.core.evaluate.sample import Sample
    from regraft.core.hookspecs import API_VERSION, hookimpl
    from regraft.core.loaded import Loaded
    from regraft.core.low_rank import LowRankDelta
    from regraft.core.offsets import HeadOffset, HeadScale, ResidualBias
    from regraft.core.operations import Convert, Operation, ScaleRows, Value
    from regraft.core.patch import Edit, Outline, Patch, overlay
    from regraft.core.portable_code import CodePatch, code_patch, portable_code, read_template
    from regraft.core.residual_bias import bake_head_scales, bake_residual_biases
    from regraft.core.sources import Reference, Source, open_checkpoint
    from regraft.core.specs import TensorSpec
    from regraft.core.tensors import LazyTensor, MemoryTensor, PromisedTensor
    from regraft.core.transformation import Params, Run, Transformation, WeightSpace

_HOMES = {
    "regraft.core.architectures": (
        "Architecture",
        "Family",
        "Part",
        "architecture_of",
        "embedding",
        "head",
        "linear",
        "norm",
    ),
    "regraft.core.checkpoint": ("Checkpoint", "FileRef"),
    "regraft.core.errors": (
        "InputError",
        "PluginError",
        "RegraftError",
        "ResourceError",
        "TransformationError",
        "Unsupported",
        "UsageError",
        "VerificationError",
    ),
    "regraft.core.evaluate.metric": ("Measured", "Measuring", "Metric"),
    "regraft.core.evaluate.sample": ("Sample",),
    "regraft.core.hookspecs": ("API_VERSION", "hookimpl"),
    "regraft.core.loaded": ("Loaded",),
    "regraft.core.low_rank": ("LowRankDelta",),
    "regraft.core.offsets": ("HeadOffset", "HeadScale", "ResidualBias"),
    "regraft.core.operations": ("Convert", "Operation", "ScaleRows", "Value"),
    "regraft.core.patch": ("Edit", "Outline", "Patch", "overlay"),
    "regraft.core.portable_code": ("CodePatch", "code_patch", "portable_code", "read_template"),
    "regraft.core.residual_bias": ("bake_head_scales", "bake_residual_biases"),
    "regraft.core.sources": ("Reference", "Source", "open_checkpoint"),
    "regraft.core.specs": ("TensorSpec",),
    "regraft.core.tensors": ("LazyTensor", "MemoryTensor", "PromisedTensor"),
    "regraft.core.transformation": ("Params", "Run", "Transformation", "WeightSpace"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "API_VERSION",
    "Architecture",
    "Checkpoint",
    "CodePatch",
    "Convert",
    "Edit",
    "Family",
    "FileRef",
    "HeadOffset",
    "HeadScale",
    "InputError",
    "LazyTensor",
    "Loaded",
    "LowRankDelta",
    "Measured",
    "Measuring",
    "MemoryTensor",
    "Metric",
    "Operation",
    "Outline",
    "Params",
    "Part",
    "Patch",
    "PluginError",
    "PromisedTensor",
    "Reference",
    "RegraftError",
    "ResidualBias",
    "ResourceError",
    "Run",
    "Sample",
    "ScaleRows",
    "Source",
    "TensorSpec",
    "Transformation",
    "TransformationError",
    "Unsupported",
    "UsageError",
    "Value",
    "VerificationError",
    "WeightSpace",
    "architecture_of",
    "bake_head_scales",
    "bake_residual_biases",
    "code_patch",
    "embedding",
    "head",
    "hookimpl",
    "linear",
    "norm",
    "open_checkpoint",
    "overlay",
    "portable_code",
    "read_template",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'regraft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
