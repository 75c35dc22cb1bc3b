"""`fine-tune`: plain training of all weights, of named tensors, or of single attention heads.

Supervised fine-tuning by cross-entropy of answers, or of whole texts, and direct preference optimisation (Rafailov et
al., arXiv 2305.18290, eq. 7), on the training loop that every model-driven step shares.

`select = "heads"` is the Precise SFT of Zhang et al., Interpreting and Improving Large Language Models in Arithmetic
Calculation (ICML 2024, arXiv 2409.01659): only the parameters of the heads that matter learn.

Deviations. The paper tunes the key heads and MLPs that path patching finds; here the heads are given, by the recipe or
by a heads.json, and MLPs can be had by `select = "names"`. A head owns its rows of q_proj with their bias, and its
columns of o_proj; under grouped-query attention its rows of k_proj and v_proj belong to several heads and stay unless
`kv = true`. The bias of o_proj and norms of queries and keys belong to no head. Slices learn as tensors of their own: a
masked gradient would let weight decay and momentum move the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.fine_tune.params import FineTuneParams

regraft_api = ">=1,<2"


class FineTune(Transformation[FineTuneParams]):
    """Trains weights on the user's data."""

    name = "fine-tune"
    summary = "Train all weights, named tensors or single attention heads: SFT, whole texts, DPO."
    paper = "Rafailov et al. 2023, DPO, arXiv 2305.18290; Zhang et al. 2024, Precise SFT, arXiv 2409.01659"
    Params = FineTuneParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: two steps on sums."""
        from regraft.core.testing.data import completions, write_rows

        rows = write_rows(folder / "rows.jsonl", completions(16))
        return {"data": str(rows), "lr": 1e-2, "steps": 2, "batch_size": 4, "train": {"precision": "float32"}}

    def check(self, checkpoint: Checkpoint, params: FineTuneParams) -> None:
        """Refuse quantised weights, data that is not there, and sequences beyond the window.

        Raises:
            Unsupported: the weights are quantised.
            UsageError: a path leads nowhere, or `max_tokens` exceeds the window.
        """
        from regraft.plugins.fine_tune.rewrite import check

        check(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: FineTuneParams) -> Outline:
        """The tensors that learn, whole or in part.

        Raises:
            UsageError: there is no such head, or no tensor of such a name.
            InputError: the heads.json is not valid, or tensors are not what the config says.
            Unsupported: it is not known where the model keeps its heads.
        """
        from regraft.plugins.fine_tune.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: FineTuneParams, run: Run) -> Patch:
        """The patch with the trained weights; the rest of every tensor that learns in part keeps its bytes.

        Raises:
            InputError: the data cannot be read, is empty, or fewer than a batch; a saved state is damaged.
            UsageError: the data is of another kind than the task asks for; the saved state belongs to another training.
            Unsupported: the model cannot be trained so.
            TransformationError: the loss is not finite.
            ResourceError: out of memory, or a record cannot be written.
        """
        from regraft.plugins.fine_tune.fit import fit

        return fit(checkpoint, params, run)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [FineTune]
