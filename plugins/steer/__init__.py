"""`steer`: constant vectors added to the outputs of attention, MLP or single heads, baked into biases.

Steering vectors of any origin: Li et al., Inference-Time Intervention (arXiv 2306.03341), section 3.2, adds
`alpha · sigma · theta` to the outputs of chosen heads; EAST (arXiv 2406.00244) adds `beta · u` to the residual stream
behind a layer, which is the MLP output of that layer; LoFiT (arXiv 2406.01563), eq. 3, learns offsets of heads.

Deviations. The vectors act on every position, those of the prompt included, because a bias does; a method that steers
generated tokens only cannot be baked. The factor that a paper puts before its vector is `strength`, or is in the file.
"""

from __future__ import annotations

from collections.abc import Sequence

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Patch
from regraft.core.transformation import AnyTransformation, WeightSpace
from regraft.plugins.steer.params import SteerParams

regraft_api = ">=1,<2"


class Steer(WeightSpace[SteerParams]):
    """Adds steering vectors at every position, without code and without hooks."""

    name = "steer"
    summary = "Bake steering vectors into the biases of attention and MLP outputs, or of single heads."
    paper = "Li et al. 2023, ITI, arXiv 2306.03341; EAST, arXiv 2406.00244; Yin et al. 2024, LoFiT, 2406.01563"
    Params = SteerParams

    def patch(self, checkpoint: Checkpoint, params: SteerParams) -> Patch:
        """One lazy edit for each bias that takes up a vector.

        Raises:
            InputError: the file is not valid, or was made for another model.
            UsageError: it names a layer or head that the model does not have.
            Unsupported: the model has no place for a vector.
        """
        from regraft.plugins.steer.rewrite import steer_patch

        return steer_patch(checkpoint, params)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [Steer]
