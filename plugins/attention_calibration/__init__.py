"""`attention-calibration`: a few heads give less weight to attention sinks, at inference and without training.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks" (ICML 2024, arXiv 2406.15765); code GATECH-EIC/ACT. Of the
weight of a chosen head on its sinks, keys whose mean weight over the rows is above a threshold, a share beta stays; the
rest goes to the other keys in proportion. Which heads gain from that is found on questions with known answers.

Deviations. Sinks are found for every row of a batch, behind padding, and while decoding (the code: the first row alone,
from its left edge, and a single row for itself). The first token is spared by its place; the code drops the first sink
that it finds. `scope = "causal"` goes by the rows so far, so that a text computes the same however it is cut; the paper
goes by the whole prompt. Keys that few rows see are no sinks. Heads are judged by the log-probability of the answer,
which moves where accuracy stands; their union is checked on questions of its own, and cut back if it does not help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.attention_calibration.params import AttentionCalibrationParams

regraft_api = ">=1,<2"


class AttentionCalibration(Transformation[AttentionCalibrationParams]):
    """Less weight on attention sinks in the heads that gain from it."""

    name = "attention-calibration"
    summary = "Find the heads whose attention sinks hurt, and cut the weight on them at inference (ACT)."
    paper = "Yu et al. 2024, arXiv 2406.15765"
    loads_with = "transformers with trust_remote_code=True"
    Params = AttentionCalibrationParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: a threshold at which random models have sinks."""
        from regraft.core.testing.data import preferences, write_rows

        asked = [(row["prompt"], [row["chosen"], row["rejected"]]) for row in preferences(16)]
        rows = [{"prompt": prompt, "options": options, "answer": 0} for prompt, options in asked]
        return {"data": str(write_rows(folder / "rows.jsonl", rows)), "layers": "1-", "tau": 0.06, "min_queries": 2}

    def check(self, checkpoint: Checkpoint, params: AttentionCalibrationParams) -> None:
        """Whether the heads or the questions are there, and the model's attention can be calibrated.

        Raises:
            UsageError: there are no such heads or layers, or the table is of another model.
            InputError: table or questions are not valid.
            Unsupported: the model's attention cannot be calibrated.
        """
        from regraft.core.measures.choices import read_choices
        from regraft.plugins.attention_calibration.aim import Aim

        Aim.of(checkpoint, params)
        for path in (params.data, params.held_out):
            if path is not None:
                read_choices(path)

    def plan(self, checkpoint: Checkpoint, params: AttentionCalibrationParams) -> Outline:
        """Config and code; the weights stay as they are."""
        from regraft.plugins.attention_calibration.rewrite import outline_of

        return outline_of(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: AttentionCalibrationParams, run: Run) -> Patch:
        """Search, if no heads are given, and export."""
        from regraft.plugins.attention_calibration.rewrite import patch_of

        return patch_of(checkpoint, params, run)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [AttentionCalibration]
