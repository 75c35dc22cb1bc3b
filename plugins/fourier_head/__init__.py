"""`fourier-head`: an ordered range of the vocabulary gets a density over an interval in place of its rows.

Gillman et al., Fourier Head: Helping Large Language Models Learn Complex Probability Distributions (ICLR 2025, arXiv
2410.22269), algorithm 1 and section 3; reference repository nate-gillman/fourier-head.

Deviations. The density is computed as a squared amplitude |A(z)|² / (2 c₀), the same function without autocorrelation
and never negative; with fewer frequencies than bins the sum over bins is known, so that training needs one bin. The
paper replaces the whole output (`mode = "replace"`); `hybrid` keeps text beside the bins, which share a gate. The
reference code mixes 1e-5 into each bin, 3.9% of the mass at 4096 bins: `floor` is the mass itself. Its initial density
is random; ours follows the rows that the bins had. Its regulariser grows with the coefficients' scale, which the
density ignores; `normalized` does not.

`mode = "segments"` is another method with the same purpose, and has its own source: see `segments`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.architectures import Family
from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.fourier_head.params import FourierHeadParams

regraft_api = ">=1,<2"


class FourierHead(Transformation[FourierHeadParams]):
    """Replaces the output rows of ordered tokens by the coefficients of a density."""

    name = "fourier-head"
    summary = "Give an ordered range of tokens (numbers, bins, actions) a smooth density as output."
    paper = "Gillman et al. 2025, ICLR, arXiv 2410.22269"
    loads_with = "transformers with trust_remote_code=True"
    Params = FourierHeadParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: the digits, four frequencies."""
        return {"tokens": "0..9", "num_frequencies": 4}

    def check(self, checkpoint: Checkpoint, params: FourierHeadParams) -> None:
        """Refuse ranges that are none, and models whose head cannot be replaced.

        Raises:
            Unsupported: the family, or there is no tokenizer.json.
            UsageError: nothing is matched, the ids have a gap or special tokens, there are too many frequencies.
            InputError: tokenizer and weights do not fit; a file is missing.
        """
        _part(params).check(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: FourierHeadParams) -> Outline:
        """The new tensors, config, code, and the tokenizer where tokens are appended."""
        outline: Outline = _part(params).outline(checkpoint, params)
        return outline

    def apply(self, checkpoint: Checkpoint, params: FourierHeadParams, run: Run) -> Patch:
        """The head, trained where that is asked for; the forecaster.

        Raises:
            InputError: data or weights cannot be read, or do not fit.
            Unsupported: the model cannot be trained.
            TransformationError: the loss is not finite.
            ResourceError: out of memory, or a log cannot be written.
        """
        patch: Patch = _part(params).apply(checkpoint, params, run)
        return patch


def _part(params: FourierHeadParams) -> Any:
    """The module that does what the mode asks for."""
    if params.mode == "segments":
        from regraft.plugins.fourier_head.segments import rewrite as forecaster

        return forecaster
    from regraft.plugins.fourier_head import rewrite

    return rewrite


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [FourierHead]


@hookimpl
def regraft_architectures() -> Sequence[Family]:
    """Where models with the head, and forecasters over segments, keep their tensors."""
    from regraft.plugins.fourier_head.families import head_families, segment_families

    return [*head_families(), *segment_families()]
