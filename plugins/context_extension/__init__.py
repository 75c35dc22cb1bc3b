"""`context-extension`: a longer context window, by config where stock classes can express it, else by code.

Entropy-ABF: Zhang et al., Extending LLMs' Context Window with 100 Samples (arXiv 2401.07004), sections 3.2 and 4,
Table 1; reference repository GAIR-NLP/Entropy-ABF. Position interpolation: Chen et al. (2306.15595). YaRN: Peng et al.
(2309.00071), whose section 3.1 also derives the NTK-aware base b · s^(d / (d - 2)). LM-Infinite: Han et al.
(2308.16137); see `lm_infinite`.

Deviations. c is the model's own window, not the 4096 of the reference code. The reference code means to exempt two
layers and scales all: `skip_layers` is 2 with remote-code, as the paper says, and 0 gives what the code does. `native`
is a staircase that the stock Ministral3 computes: equal to the exact scale inside the window and at the end of each
multiple of it, above it by at most ln 2 / ln c elsewhere. For models whose base is above 100 000 already the paper has
no rule; ours is max(500 000, b · s^(d / (d - 2))). In a layer with a sliding window, keys in sight count, not the
position. `tune` is appendix A, with gradients clipped at norm 1, of which the paper says nothing; the reference
repository has no training code. `probe` draws figure 1 from means of entropies, where that repository takes the entropy
of mean weights, after a second softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.context_extension.params import ContextExtensionParams


class ContextExtension(Transformation[ContextExtensionParams]):
    """Extends the context window of a model with rotary positions, and fine-tunes and measures it where asked to."""

    name = "context-extension"
    summary = "Extend the context window: entropy-aware ABF, ABF, position interpolation, NTK, YaRN, LM-Infinite."
    paper = (
        "Zhang et al. 2024, arXiv 2401.07004; Chen et al. 2023, 2306.15595; Peng et al. 2023, 2309.00071; "
        "Han et al. 2023, 2308.16137"
    )
    loads_with = "stock transformers (export remote-code, lm-infinite: transformers with trust_remote_code=True)"
    Params = ContextExtensionParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: four times the window, by a larger rotary base."""
        return {"method": "abf", "target_length": 4 * int(checkpoint.config.get("max_position_embeddings", 128))}

    def check(self, checkpoint: Checkpoint, params: ContextExtensionParams) -> None:
        """Refuse models and parameters for which there is no exact or stated way.

        Raises:
            Unsupported: with the reason and the remedy.
            InputError: the config is malformed.
            UsageError: the data of the fine-tune is not there.
        """
        from regraft.plugins.context_extension.rewrite import check

        check(checkpoint, params)

    def plan(self, checkpoint: Checkpoint, params: ContextExtensionParams) -> Outline:
        """Config and tokenizer length; code or folded weights where asked for; with a fine-tune every weight."""
        from regraft.plugins.context_extension.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: ContextExtensionParams, run: Run) -> Patch:
        """The patch; a model is made only for `tune` and `probe`.

        Raises:
            InputError: data cannot be read or is too little or too short; the checkpoint has no tokenizer.
            UsageError: the data is of another kind; the saved state belongs to another training.
            Unsupported: the model cannot be trained or measured, or its own code may not run.
            TransformationError: the loss is not finite.
            ResourceError: out of memory, or a log cannot be written.
        """
        from regraft.plugins.context_extension.rewrite import make_patch

        patch = make_patch(checkpoint, params)
        if params.tune is None and params.probing is None:
            return patch
        from regraft.plugins.context_extension.fit import fit

        return fit(checkpoint, patch, params, run)


@hookimpl
def regraft_transformations() -> list[type[AnyTransformation]]:
    """Our transformation."""
    return [ContextExtension]
