"""Images as weights: `vlora` bakes an image into a language model, `vlora-train` trains the generator that does it.

Ma et al., Visual Perception by Large Language Model's Weights (VLoRA, NeurIPS 2024, arXiv 2405.20339), section 3;
reference repository FeipengMa6/VLoRA. A generator turns the features of an image into low-rank deltas of queries, keys,
values and attention outputs, and into a path beside the MLP; no visual token enters the sequence.

Deviations. The authors add the deltas while the model runs, and can change the image from prompt to prompt; so does
`output = "attached"`, while `adapter` and `merged` hold those of one image. Their generator is square: here inputs
and outputs of each projection have their own widths, so that grouped key-value heads and any head size fit. Their path
beside the MLP needs their own class: merged, it is more hidden units of the MLP, in classes that have biases there.
Images are looked at one by one.
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
from regraft.plugins.vlora.params import VloraParams
from regraft.plugins.vlora.train import VloraTrain

regraft_api = ">=1,<2"


class Vlora(Transformation[VloraParams]):
    """Adds the deltas that a generator makes of an image."""

    name = "vlora"
    summary = "Bake what an image shows into the weights, as low-rank deltas made by a trained generator."
    paper = "Ma et al. 2024, VLoRA, NeurIPS, arXiv 2405.20339"
    loads_with = 'peft; output = "merged": stock transformers; output = "attached": with trust_remote_code=True'
    Params = VloraParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: a random generator, and the features of an image that is merged."""
        from regraft.plugins.vlora.example import write_features, write_generator

        generator = write_generator(checkpoint, folder / "generator")
        features = write_features(folder / "features.safetensors", ["image"])
        return {"generator": str(generator), "features": str(features), "output": "merged"}

    def plan(self, checkpoint: Checkpoint, params: VloraParams) -> Outline:
        """The tensors that get a delta and, for type m, every MLP, or those of an attached generator and its encoder.

        Raises:
            InputError: generator, image, features or encoder are not valid, or for another model.
            Unsupported: the model has no place for a type; an encoder of another kind.
            UsageError: there is no generator, no encoder, or the generator has no such type.
        """
        from regraft.plugins.vlora.rewrite import outline

        return outline(checkpoint, params)

    def apply(self, checkpoint: Checkpoint, params: VloraParams, run: Run) -> Patch:
        """Low-rank edits, all factors computed.

        Raises:
            InputError, Unsupported, UsageError: as `plan`; or the image cannot be decoded, or values are not finite.
            ResourceError: out of memory.
        """
        from regraft.plugins.vlora.rewrite import apply

        return apply(checkpoint, params, run)


@hookimpl
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """The transformations of this plugin."""
    return [Vlora, VloraTrain]


@hookimpl
def regraft_architectures() -> Sequence[Family]:
    """Where models with a generator attached keep their tensors."""
    from regraft.plugins.vlora.attach import families

    return families()
