"""The hypernetwork that a checkpoint carries for its runtime: what policy.json says of it, and its weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported
from regraft.plugins.tokenizer_retrofit.dynamic.table import embeddings_of
from regraft.plugins.tokenizer_retrofit.params import HypernetSettings
from regraft.plugins.tokenizer_retrofit.tables import Tables
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    import torch

_UNUSED = ("model.embeddings.word_embeddings", "model.embeddings.position_ids", "model.embeddings.token_type_ids",
           "output_projection_out", "out_scaler", "bias_projection")  # fmt: skip
"""Merged tokens are read and never written, so rows and biases of the head are not predicted."""


def network_bytes(settings: HypernetSettings) -> int:
    """Size of the network's weights; 0 where they are not there, which `carried_network` refuses."""
    file = settings.folder / "model.safetensors"
    return file.stat().st_size if file.is_file() else 0


def carried_network(
    checkpoint: Checkpoint, tokenizer: TokenizerFile, settings: HypernetSettings
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What policy.json says of the network, and its weights, fp32.

    Raises:
        InputError: the network is malformed, or was made for another model, or reads a language and none is given.
        Unsupported: it is of another kind, or reads a head of its own that the model lacks.
    """
    from regraft.plugins.tokenizer_retrofit.hypernet import open_hypernet

    network = open_hypernet(settings.folder)
    shape, spec = network.shape, checkpoint.specs[embeddings_of(checkpoint, tokenizer)]
    if shape.width != spec.shape[1] or spec.rows < shape.vocabulary:
        raise InputError(
            "the hypernetwork was made for another model", where=settings.folder,
            expected=f"at least {shape.vocabulary} rows of {shape.width} numbers", found=list(spec.shape),
        )  # fmt: skip
    if shape.separate and Tables.of(checkpoint, tokenizer).head is None:
        raise Unsupported("the hypernetwork reads rows of a head of its own", where=settings.folder,
                          found="a tied head", remedy="take the network made for this model")  # fmt: skip
    if shape.languages and not 0 <= (settings.language if settings.language is not None else -1) < shape.languages:
        raise InputError("the hypernetwork reads a language", where="hypernet.language", found=settings.language,
                         expected=f"0 to {shape.languages - 1}")  # fmt: skip
    used = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith(_UNUSED)}
    weights = {name: tensor.contiguous() for name, tensor in used.items()}
    return {**asdict(shape), "language": settings.language}, weights
