"""`vlora-train`: a generator of perceptual weights learns from images and texts.

Ma et al., VLoRA (NeurIPS 2024, arXiv 2405.20339): first the generator alone, then generator and language model; the
vision encoder stays frozen in both. Deltas act while the model runs, each row of a batch having those of its own
picture; nothing is merged.

Deviations. The authors' code overwrites the image's placeholder by token 0 and masks it out of attention, where it
still takes a position: here it is removed. Positions and queries of their second stage begin where a stage of another
width ended, which cannot be loaded: here a stage goes on with the generator's own sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import Run, Transformation
from regraft.plugins.vlora.train_params import VloraTrainParams


class VloraTrain(Transformation[VloraTrainParams]):
    """Trains a generator, alone or with the language model."""

    name = "vlora-train"
    summary = "Train a generator that turns images into weights: alone, or with the language model."
    paper = "Ma et al. 2024, VLoRA, arXiv 2405.20339"
    Params = VloraTrainParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: two steps of the second stage, with a new generator."""
        from regraft.core.testing.data import write_rows
        from regraft.plugins.vlora.example import SIZES, write_features

        colours = ("red", "green", "blue", "white")
        rows = [{"prompt": "colour?", "answer": word, "features": word} for word in colours]
        return {
            "data": str(write_rows(folder / "rows.jsonl", rows)),
            "features": str(write_features(folder / "features.safetensors", colours)),
            "train": "both", "new": SIZES, "lr": 1e-2, "batch_size": 2, "learning": {"precision": "float32"},
        }  # fmt: skip

    def check(self, checkpoint: Checkpoint, params: VloraTrainParams) -> None:
        """Refuse data that is not there and, where the language model learns, quantised weights.

        Raises:
            Unsupported: the weights are quantised, or a generator is attached to the model already.
            UsageError: a path leads nowhere, or data that is not in files.
        """
        from regraft.plugins.vlora.train_rewrite import check

        check(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: VloraTrainParams) -> Outline:
        """The generator's files in `vlora/`; in the second stage also every weight.

        Raises:
            InputError: a generator, features or the config of the vision encoder is not valid.
            Unsupported: the model does not keep its projections where deltas could act.
            UsageError: sizes contradict each other, or a generator is for another model or other features.
        """
        from regraft.plugins.vlora.train_rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: VloraTrainParams, run: Run) -> Patch:
        """The patch with the generator, and with the trained weights of the second stage.

        Raises:
            InputError: data or an image cannot be read, or there are fewer rows than a batch; a saved state is damaged.
            UsageError: the rows have no answers; the saved state belongs to another training.
            Unsupported: the model cannot be trained so.
            TransformationError: the loss is not finite.
            ResourceError: out of memory, or a record cannot be written.
        """
        from regraft.plugins.vlora.train_fit import fit

        return fit(checkpoint, params, run)
