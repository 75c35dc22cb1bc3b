"""`lofit`: a few attention heads learn a constant offset each, baked into biases.

Yin, Ye and Durrett, "LoFiT: Localized Fine-tuning on LLM Representations" (NeurIPS 2024, arXiv 2406.01563), code
fc2869/lo-fit. With z[l, h] what head h of layer l gives to o_proj, at every position:

    stage 1   z ← (1 + A) ⊙ z for all heads, A ~ N(0, 1e-3²), loss + λ·Σ|A|; the K heads with the largest ‖A‖₂ are
              chosen, and A is thrown away
    stage 2   z ← z + v for the chosen heads; v is the result

Deviations. v begins at 0, not at N(0, 1e-3²): its gradient there is not zero, so no symmetry is to be broken, and the
reference of DPO is then the base itself. Adapters are fp32 whatever the model computes in. The loss counts answer
tokens by where answers begin in the text, not by a response template. The result is a checkpoint that stock classes
load, not a list of heads. K is 3% of the heads; the paper's models use 16 to 48.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.lofit.params import LofitParams

regraft_api = ">=1,<2"


class Lofit(Transformation[LofitParams]):
    """Localized fine-tuning: offsets of a few heads, learnt from answers or preferences."""

    name = "lofit"
    summary = "Learn a constant offset for a few attention heads, and bake it into biases."
    paper = "Yin et al. 2024, arXiv 2406.01563"
    Params = LofitParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: two heads, two steps a stage, on sums."""
        from regraft.core.testing.data import completions, write_rows

        rows, steps = write_rows(folder / "rows.jsonl", completions(16)), {"steps": 2}
        return {"task": "sft", "data": str(rows), "heads": 2, "select": steps, "tune": steps, "precision": "float32"}

    def check(self, checkpoint: Checkpoint, params: LofitParams) -> None:
        """Whether the data is there, the heads are, and the model has a place for offsets; before any training.

        Raises:
            UsageError: there is no such file, layer or head.
            InputError: the file of heads is not valid.
            Unsupported: the model has no place for offsets.
        """
        from regraft.core.data.load import check_sources
        from regraft.plugins.lofit.rewrite import lofit_outline

        for data in (params.data, params.held_out):
            if data is not None:
                check_sources(data)
        lofit_outline(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: LofitParams) -> Outline:
        """The biases, whose values come with the run."""
        from regraft.plugins.lofit.rewrite import lofit_outline

        return lofit_outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: LofitParams, run: Run) -> Patch:
        """Train, and bake."""
        from regraft.plugins.lofit.rewrite import lofit_patch

        return lofit_patch(checkpoint, params, run)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [Lofit]
