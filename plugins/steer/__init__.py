"""`steer`: constant vectors added to the outputs of attention, MLP or single heads, baked into biases.

The vectors come from a file, or are computed from the activations of prompts:

- as the difference of means of two sets of prompts, such as `theta` of Li et al., Inference-Time Intervention
  (arXiv 2306.03341), section 3.2, which adds `alpha · sigma · theta` to the outputs of the heads that tell true from
  false best: `site = "head"`, `heads` a number, `normalise = "deviation"`, `strength` alpha;
- as the entropy-weighted mean of EAST (arXiv 2406.00244), `u = sum_i (H_i / sum H) z_i` less the plain mean, added to
  the residual stream behind a layer, `h + beta u`: `weighting = "entropy"`, `strength` beta.

LoFiT (arXiv 2406.01563), eq. 3, learns offsets of heads; a file may hold those too.

Deviations. The vectors act on every position, those of the prompt included, because a bias does; a method that steers
generated tokens only cannot be baked. EAST's H is the entropy of the distribution of actions over sampled completions;
ours is that of the model's next token, over all tokens or over `answers`. ITI's preferred direction is that of a
probe's mass mean shift, which is the difference of means; its other one, a logistic probe's, is not offered. Heads are
chosen by how many prompts the difference of means puts on the right side, each prompt left out in turn, in place of a
probe's accuracy on a validation set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Outline, Patch
from regraft.core.transformation import AnyTransformation, Run, Transformation
from regraft.plugins.steer.params import SteerParams

regraft_api = ">=1,<2"


class Steer(Transformation[SteerParams]):
    """Adds steering vectors at every position, without code and without hooks."""

    name = "steer"
    summary = "Bake steering vectors, from a file or from prompts, into the biases of attention, MLP or single heads."
    paper = "Li et al. 2023, ITI, arXiv 2306.03341; EAST, arXiv 2406.00244; Yin et al. 2024, LoFiT, 2406.01563"
    Params = SteerParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: a random vector for the MLP output of layer 0."""
        import torch
        from safetensors.torch import save_file

        from regraft.core.architectures import architecture_of

        size = architecture_of(checkpoint.config, checkpoint.specs).hidden_size
        vector = torch.randn(size, generator=torch.Generator().manual_seed(0))
        save_file({"layers.0.mlp_out": 0.1 * vector}, folder / "vectors.safetensors")
        return {"vectors": str(folder / "vectors.safetensors")}

    def check(self, checkpoint: Checkpoint, params: SteerParams) -> None:
        """Refuse prompts that are not there.

        Raises:
            UsageError: a path that leads nowhere, or a folder without data.
        """
        from regraft.plugins.steer.rewrite import check

        del checkpoint
        check(params)

    def plan(self, checkpoint: Checkpoint, params: SteerParams) -> Outline:
        """An edit for each bias that may take up a vector.

        Raises:
            InputError: the file of vectors or heads is not valid, or was made for another model.
            UsageError: it, or the recipe, names a layer or head that the model does not have.
            Unsupported: the model has no place for a vector.
        """
        from regraft.plugins.steer.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: SteerParams, run: Run) -> Patch:
        """The patch; prompts run through the model as it stands at this step.

        Raises:
            InputError, UsageError, Unsupported: as `plan`; or prompts cannot be read, or the model cannot run.
            TransformationError: the prompts' activations do not differ.
            ResourceError: out of memory.
        """
        from regraft.plugins.steer.rewrite import steer

        return steer(checkpoint, params, run)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformation of this plugin."""
    return [Steer]
