"""Where an offset of the values comes out of attention unchanged."""

from __future__ import annotations

from regraft.core.architectures import Architecture
from regraft.core.architectures.families import built_in
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import Unsupported

_PLAIN = (
    "arcee", "cohere", "gemma", "nemotron", "olmo", "opt", "phi", "seed_oss", "stablelm", "starcoder2"
)  # fmt: skip
"""Families outside the table whose attention is a softmax over the keys, of the values that v_proj gives."""

_REMEDY = "use offsets of heads or of the attention output"


def check_value_bias(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Refuse models in which the weights of the values do not sum to one, or v_proj is not what they are made of.

    Raises:
        Unsupported: the attention has sinks, clips its values, or is not known to be plain.
    """
    sinks = [name for name in checkpoint.specs if name.endswith(".sinks")]
    if sinks or architecture.model_type == "gpt_oss":
        raise Unsupported(
            "attention weights of a model with attention sinks sum to less than one, so a bias of v_proj is no offset",
            where=sinks[0] if sinks else "config.json: model_type",
            found=architecture.model_type,
            remedy=_REMEDY,
        )
    if checkpoint.config.get("clip_qkv") is not None:
        raise Unsupported(
            "the model clips its values, so a bias of v_proj is no offset",
            where="config.json: clip_qkv",
            found=checkpoint.config["clip_qkv"],
            remedy=_REMEDY,
        )
    if architecture.model_type not in (*built_in(), *_PLAIN):
        raise Unsupported(
            "it is not known whether a bias of v_proj comes out of this model's attention unchanged",
            where="config.json: model_type",
            found=architecture.model_type,
            remedy=_REMEDY,
        )
