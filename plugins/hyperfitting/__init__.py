"""`hyperfitting`: a model trained on a few sequences until its training loss is nearly zero, for better greedy text.

Carlsson et al., The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation
(arXiv 2412.04318, ICLR 2025), section 3: 2000 sequences of 256 tokens, 20 epochs, batch 8, Adam at 1e-6, no weight
decay, all parameters, ordinary next-token cross-entropy. Reference repository: FreddeFrallan/Hyperfitting.

Deviations. The paper says "near-zero" training loss: we stop when the mean over an epoch is below `stop_loss`. It
states no clipping: there is none unless `clip_norm` asks for it. Texts are packed into sequences of exactly `seq_len`
tokens; `pack = false` takes the beginnings of long enough texts, as the reference code does, which however takes the
first ones where we draw at random, as the paper says. That code leaves AdamW's weight decay at 0.01, trains with the
model's own dropout, and stores no model. In generation it pads behind an end token and counts the padding in the
type-token ratio; we never choose end tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.hyperfitting.params import HyperfittingParams

regraft_api = ">=1,<2"


class Hyperfitting(Transformation[HyperfittingParams]):
    """Trains all weights on few sequences, and reports what that does to text."""

    name = "hyperfitting"
    summary = "Train on a few sequences until the loss is nearly zero: sharper, less repetitive greedy text."
    paper = "Carlsson et al. 2025, ICLR, arXiv 2412.04318"
    Params = HyperfittingParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: eight samples of sentences."""
        from regraft.core.testing.data import texts

        (folder / "text.txt").write_text(" ".join(row["text"] for row in texts(64)))
        report = {"samples": 2, "context": 8, "ttr_window": 12, "new_tokens": 16, "citation_ngram": 4}
        return {"data": str(folder / "text.txt"), "samples": 8, "seq_len": 24, "batch_size": 4, "epochs": 2,
                "precision": "float32", "held_out": 2, "report": report}  # fmt: skip

    def check(self, checkpoint: Checkpoint, params: HyperfittingParams) -> None:
        """Refuse what cannot be trained, and lengths beyond the model's window.

        Raises:
            Unsupported: the weights are quantised.
            UsageError: data is not there; sequences or continuations are longer than the window.
        """
        from regraft.plugins.hyperfitting.rewrite import check

        check(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: HyperfittingParams) -> Outline:
        """Every floating-point tensor is rewritten, in its shape and dtype."""
        from regraft.plugins.hyperfitting.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: HyperfittingParams, run: Run) -> Patch:
        """Train, and measure before and after.

        Raises:
            InputError: data cannot be read, or is too little.
            UsageError: the settings contradict the data or the model's window.
            Unsupported: the model cannot be trained, or its own code may not run.
            TransformationError: the loss is not finite.
            ResourceError: out of memory, or a log cannot be written.
        """
        from regraft.plugins.hyperfitting.fit import fit

        return fit(checkpoint, params, run)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [Hyperfitting]
