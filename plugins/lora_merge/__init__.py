"""Merge a LoRA or DoRA adapter, as PEFT saves it, into the weights.

Hu et al., LoRA (arXiv 2106.09685), eq. 3: W' = W + (alpha / r)·B A. Kalajdzievski, rank-stabilised LoRA (arXiv
2312.03732): alpha / sqrt(r). Liu et al., DoRA (arXiv 2402.09353), eq. 5. Reference: huggingface/peft 0.21,
`merge_and_unload`.

Deviations from it: products and sums in fp32 and one rounding for every kind of layer and adapter dtype (peft rounds
the delta of embeddings and stacked experts first); embeddings and head that were tied part where an adapter changes one
of them; an option or a tensor that the merge would have to ignore is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Patch
from regraft.core.transformation import AnyTransformation, WeightSpace
from regraft.plugins.lora_merge.params import LoraMergeParams

regraft_api = ">=1,<2"


class LoraMerge(WeightSpace[LoraMergeParams]):
    """Adds an adapter's low-rank deltas to the weights, and replaces what the adapter trained whole."""

    name = "lora-merge"
    summary = "Merge a PEFT LoRA or DoRA adapter into the weights."
    paper = "Hu et al., LoRA, arXiv 2106.09685; Liu et al., DoRA, arXiv 2402.09353"
    Params = LoraMergeParams

    def patch(self, checkpoint: Checkpoint, params: LoraMergeParams) -> Patch:
        """One lazy edit for each tensor that the adapter changes.

        Raises:
            InputError: the adapter is not valid, or was made for another model.
            Unsupported: it cannot be merged into this base.
        """
        from regraft.plugins.lora_merge.rewrite import merge_patch

        return merge_patch(checkpoint, params)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [LoraMerge]
