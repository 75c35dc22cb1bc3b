"""`context-extension`: a longer context window, by config where stock classes can express it, else by code.

Entropy-ABF: Zhang et al., Extending LLMs' Context Window with 100 Samples (arXiv 2401.07004), sections 3.2 and 4,
Table 1; reference repository GAIR-NLP/Entropy-ABF. Position interpolation: Chen et al. (2306.15595). YaRN: Peng et al.
(2309.00071), whose section 3.1 also derives the NTK-aware base b · s^(d / (d - 2)).

Deviations. c is the model's own window, not the 4096 of the reference code. The reference code means to exempt two
layers and scales all: `skip_layers` is 2 with remote-code, as the paper says, and 0 gives what the code does. `native`
is a staircase that the stock Ministral3 computes: equal to the exact scale inside the window and at the end of each
multiple of it, above it by at most ln 2 / ln c elsewhere. For models whose base is above 100 000 already the paper has
no rule; ours is max(500 000, b · s^(d / (d - 2))). In a layer with a sliding window, keys in sight count, not the
position.
"""

from __future__ import annotations

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Patch
from regraft.core.transformation import AnyTransformation, WeightSpace
from regraft.plugins.context_extension.params import ContextExtensionParams
from regraft.plugins.context_extension.rewrite import extend, make_patch


class ContextExtension(WeightSpace[ContextExtensionParams]):
    """Extends the context window of a model with rotary positions."""

    name = "context-extension"
    summary = "Extend the context window: entropy-aware ABF, ABF, position interpolation, NTK-aware base, YaRN."
    paper = "Zhang et al. 2024, arXiv 2401.07004; Chen et al. 2023, 2306.15595; Peng et al. 2023, 2309.00071"
    loads_with = "stock transformers (export remote-code: transformers with trust_remote_code=True)"
    Params = ContextExtensionParams

    def check(self, checkpoint: Checkpoint, params: ContextExtensionParams) -> None:
        """Refuse models and parameters for which there is no exact or stated way.

        Raises:
            Unsupported: with the reason and the remedy.
        """
        extend(checkpoint, params)

    def patch(self, checkpoint: Checkpoint, params: ContextExtensionParams) -> Patch:
        """The patch: config and tokenizer length; code or folded weights where asked for."""
        return make_patch(checkpoint, params)


@hookimpl
def regraft_transformations() -> list[type[AnyTransformation]]:
    """Our transformation."""
    return [ContextExtension]
