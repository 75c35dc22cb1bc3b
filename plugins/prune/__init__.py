"""`prune`: the weights that count least become zero, in place.

Wanda (Sun et al., A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695) scores a weight
by `|W_ij| · sqrt(E x_j²)` and prunes the lowest of every output row. Shukor and Cord, Implicit Multimodal Alignment
(arXiv 2405.16700; reference code mshukor/ima-lmms), find that the masks of several tasks overlap so far that one, the
alpha-SubNet, serves them all; and that MLPs of some layers can be skipped.

Deviations. Inputs are measured in one pass through the model as it is, not layer by layer behind layers that are
pruned already. The mean is over tokens, not over sequences, which is the same ranking within a matrix. `mean` averages
the tasks' scores and prunes once, where the reference code averages masks. Their skipping may spare the text tokens;
zeros in the weights act on every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.prune.params import PruneParams

regraft_api = ">=1,<2"


class Prune(Transformation[PruneParams]):
    """Zeros in place of the weights that count least."""

    name = "prune"
    summary = "Zero the weights that count least, by Wanda or magnitude; one mask for several tasks, whole MLPs."
    paper = "Sun et al. 2023, Wanda, arXiv 2306.11695; Shukor and Cord 2024, arXiv 2405.16700"
    Params = PruneParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: a quarter of the weights, by their size."""
        return {"score": "magnitude", "sparsity": 0.25}

    def check(self, checkpoint: Checkpoint, params: PruneParams) -> None:
        """Refuse data that are not there.

        Raises:
            UsageError: a path that leads nowhere, or a folder without data.
        """
        from regraft.core.data.load import check_sources

        del checkpoint
        for data in params.measured.values():
            check_sources(data)

    def plan(self, checkpoint: Checkpoint, params: PruneParams) -> Outline:
        """An edit for each tensor that gets zeros; its shape and dtype stay.

        Raises:
            UsageError: the model does not have one of the layers.
            Unsupported: the model has no such projections, a pattern does not fit its sizes, inputs of experts are to
                be measured, or so little is to go that nothing would.
            InputError: the tensors are not those of such a model.
        """
        from regraft.plugins.prune.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: PruneParams, run: Run) -> Patch:
        """The patch; for Wanda, data run through the model as it stands at this step.

        Raises:
            InputError, UsageError, Unsupported: as `plan`; or data cannot be read, or the model cannot run.
            ResourceError: out of memory.
        """
        from regraft.plugins.prune.rewrite import prune

        return prune(checkpoint, params, run)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [Prune]
