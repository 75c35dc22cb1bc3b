"""A constant factor on attention logits, folded into the weights that make the queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.core.architectures import Architecture, Slot, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported
from regraft.core.host import host
from regraft.core.operations import ScaleRows
from regraft.core.patch import Edit
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.core.tensors import LazyTensor, RowReader

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Factors(LazyTensor):
    """One factor for each row of a tensor: `factor` in the runs, 1 elsewhere. fp32 [rows]."""

    spec: TensorSpec
    factor: float
    runs: tuple[slice, ...]

    def open(self, device: str = "cpu") -> RowReader:
        """Slices of the vector."""
        import torch

        factors = torch.ones(self.spec.rows, dtype=torch.float32)
        for run in self.runs:
            factors[run] = self.factor
        moved = factors.to(device)

        def read(start: int, stop: int) -> torch.Tensor:
            return moved[start:stop]

        return read


def fold_logit_scale(checkpoint: Checkpoint, factor: float) -> Mapping[str, Edit]:
    """Edits after which every attention logit is `factor` times what it was.

    Rows of q_proj (of a fused projection, those of the queries) and of its bias are scaled. Where queries are normed
    that would change nothing, so the norm's weight is scaled instead.

    Args:
        checkpoint: what is edited.
        factor: t.

    Raises:
        Unsupported: queries are clipped after the projection, or a weight is not stored as floats.
    """
    if checkpoint.config.get("clip_qkv") is not None:
        raise Unsupported(
            "queries are clipped after the projection, so a factor in the weights is not a factor on the logits",
            where="config.json: clip_qkv",
            expected="null",
            found=checkpoint.config["clip_qkv"],
            remedy="leave logit_scale out",
        )
    architecture = architecture_of(checkpoint.config, checkpoint.specs, host().architectures())
    edits: dict[str, Edit] = {}
    for layer in range(architecture.num_layers):
        normed = architecture.has("q_norm", layer)
        slot = architecture.slot("q_norm" if normed else "q_proj", layer)
        offset = _norm_offset(architecture) if normed else 0.0
        edits[slot.tensor] = _scaled(checkpoint, slot.tensor, slot, factor, offset)
        if slot.bias is not None:
            edits[slot.bias] = _scaled(checkpoint, slot.bias, slot, factor, 0.0)
    return edits


def _norm_offset(architecture: Architecture) -> float:
    if architecture.norm_offset is None:
        raise Unsupported(
            "it is not known whether the query norms of this family store w or w - 1",
            where="config.json: model_type",
            found=architecture.model_type,
            remedy="leave logit_scale out",
        )
    return architecture.norm_offset


def _scaled(checkpoint: Checkpoint, name: str, slot: Slot, factor: float, offset: float) -> Edit:
    spec = checkpoint.tensor(name).spec
    if spec.dtype not in FLOAT_CODES or (slot.transposed and len(spec.shape) > 1):
        raise Unsupported(
            "the weight cannot be scaled row by row",
            where=name,
            expected="floats, stored by output rows",
            found=spec,
            remedy="leave logit_scale out",
        )
    factors = Factors(TensorSpec("factors", "F32", (spec.rows,)), factor, slot.rows)
    return Edit(spec, ScaleRows(name, factors, offset))
