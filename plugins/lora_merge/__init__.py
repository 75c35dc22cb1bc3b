"""Merge a LoRA or DoRA adapter, as PEFT saves it, into the weights.

Hu et al., LoRA (arXiv 2106.09685), eq. 3: W' = W + (alpha / r)·B A. Kalajdzievski, rank-stabilised LoRA (arXiv
2312.03732): alpha / sqrt(r). Liu et al., DoRA (arXiv 2402.09353), eq. 5. Reference: huggingface/peft 0.21,
`merge_and_unload`.

Deviations from it: products and sums in fp32 and one rounding for every kind of layer and adapter dtype (peft rounds
the delta of embeddings and stacked experts first); embeddings and head that were tied part where an adapter changes one
of them; an option or a tensor that the merge would have to ignore is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Patch
from regraft.core.transformation import AnyTransformation, Run, WeightSpace
from regraft.plugins.lora_merge.params import LoraMergeParams

regraft_api = ">=1,<2"

SAMPLE = 1 << 16
"""Elements of every tensor that are looked at to say how much of a delta rounding loses: 3 ms for each."""


class LoraMerge(WeightSpace[LoraMergeParams]):
    """Adds an adapter's low-rank deltas to the weights, and replaces what the adapter trained whole."""

    name = "lora-merge"
    summary = "Merge a PEFT LoRA or DoRA adapter into the weights."
    paper = "Hu et al., LoRA, arXiv 2106.09685; Liu et al., DoRA, arXiv 2402.09353"
    Params = LoraMergeParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: a random adapter of rank 2 for o_proj of layer 0."""
        from regraft.core.architectures import architecture_of
        from regraft.core.testing.adapters import write_adapter

        slot = architecture_of(checkpoint.config, checkpoint.specs).slot("o_proj", 0)
        rows, columns = slot.shape[slot.row_axis], slot.shape[slot.column_axis or 0]
        stem = f"base_model.model.{slot.tensor.removesuffix('.weight')}"
        shapes = {f"{stem}.lora_A.weight": (2, columns), f"{stem}.lora_B.weight": (rows, 2)}
        return {"adapter": str(write_adapter(folder / "adapter", shapes, fan_in_fan_out=slot.transposed))}

    def patch(self, checkpoint: Checkpoint, params: LoraMergeParams) -> Patch:
        """One lazy edit for each tensor that the adapter changes.

        Raises:
            InputError: the adapter is not valid, or was made for another model.
            Unsupported: it cannot be merged into this base.
        """
        from regraft.plugins.lora_merge.rewrite import merge_patch

        return merge_patch(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: LoraMergeParams, run: Run) -> Patch:
        """The patch with the run's seeds, and what becomes of the deltas: `deltas.json`, `lost` in the metrics."""
        from regraft.core.delta_report import deltas, reports, rounded, warnings
        from regraft.plugins.lora_merge.rewrite import merge_patch

        patch = merge_patch(checkpoint, params, lambda tensor: run.seed_for(f"rounding of {tensor}"))
        found = deltas(checkpoint, patch.edits, sample=SAMPLE)
        if not found:
            return patch
        metrics = {**patch.metrics, "lost": rounded(max(one.lost for one in found))}
        return replace(patch, metrics=metrics, reports=reports(found), notes=(*patch.notes, *warnings(found)))


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [LoraMerge]
