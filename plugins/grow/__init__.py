"""`grow`: a larger model that computes the same function, to be trained on.

FLM-101B (Li et al., arXiv 2309.03852) grows a model in stages with MSG (Yao et al., Masked Structural Growth, arXiv
2305.02869; reference code cofe-ai/MSG): new parts carry masks that are 0 at first, so the function does not change, and
rise to 1 in training.

Deviations. A stock class has no masks, so their place is taken by zeros in the weights themselves: whatever writes to
the residual stream from a new part is 0 (or, for split neurons, shares the old part's weight), while whatever feeds it
is a copy of an old part, so that gradients reach it after one step. LayerNorm statistics over live channels alone
cannot be had that way: the width of the residual stream grows only in models with RMSNorm. MSG's schedule of masks,
and the transfer of optimiser moments, belong to training and are not done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Patch
from regraft.core.transformation import AnyTransformation, WeightSpace
from regraft.plugins.grow.params import GrowParams

regraft_api = ">=1,<2"


class Grow(WeightSpace[GrowParams]):
    """More layers, neurons, heads or channels, and the same logits."""

    name = "grow"
    summary = "Grow layers, MLP width, heads or hidden size without changing what the model computes."
    paper = "Yao et al. 2023, Masked Structural Growth, arXiv 2305.02869; FLM-101B, arXiv 2309.03852"
    Params = GrowParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: a third more neurons in every MLP."""
        return {"intermediate_size": int(checkpoint.config.get("intermediate_size", 96)) * 4 // 3}

    def patch(self, checkpoint: Checkpoint, params: GrowParams) -> Patch:
        """Lazy edits of the tensors that grow, new layers, and the new sizes in config.json.

        Raises:
            Unsupported: the family cannot grow so and compute the same.
            UsageError: a size is no growth, or sizes do not fit each other.
            InputError: config and tensors do not fit each other.
        """
        from regraft.plugins.grow.rewrite import grow

        return grow(checkpoint, params)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [Grow]
