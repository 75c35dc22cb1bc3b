"""The tensors that have one row for each token."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

_ELSEWHERE = re.compile(r"\.\d+\.|position")


@dataclass(frozen=True)
class Tables:
    """Names of the tensors whose first axis is the vocabulary.

    Args:
        embeddings: of the input.
        head: of the output; None where it is the embeddings.
        bias: of the head; None without.
        rows: of each.
        causal: whether the family is known, or seen, to predict the next token; not so for encoders.
    """

    embeddings: str
    head: str | None
    bias: str | None
    rows: int
    causal: bool = True

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: TokenizerFile) -> Tables:
        """Those of a checkpoint.

        Raises:
            Unsupported: which tensors they are is in doubt, or they are not floating-point.
            InputError: the tokenizer has ids beyond the rows.
        """
        architecture = architecture_of(checkpoint.config, checkpoint.specs)
        embeddings = architecture.slot("embed_tokens").tensor
        causal = architecture.has("lm_head")
        own = _own_head(checkpoint, architecture, embeddings) if causal else _tall(checkpoint, embeddings, 2)
        bias = _bias(checkpoint, architecture) if causal else _tall(checkpoint, embeddings, 1)
        found = cls(embeddings, own, bias, checkpoint.tensor(embeddings).spec.rows, causal)
        found._check(checkpoint, tokenizer)
        return found

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(name for name in (self.embeddings, self.head, self.bias) if name is not None)

    def by_role(self) -> dict[Literal["embeddings", "head", "bias"], str]:
        """Their names by what they are."""
        found: dict[Literal["embeddings", "head", "bias"], str | None] = {
            "embeddings": self.embeddings, "head": self.head, "bias": self.bias
        }  # fmt: skip
        return {role: name for role, name in found.items() if name is not None}

    def specs(self, checkpoint: Checkpoint, rows: int) -> dict[str, TensorSpec]:
        """The tables with another number of rows."""
        old = [checkpoint.specs[name] for name in self.names]
        return {spec.name: TensorSpec(spec.name, spec.dtype, (rows, *spec.shape[1:])) for spec in old}

    def _check(self, checkpoint: Checkpoint, tokenizer: TokenizerFile) -> None:
        for name in self.names:
            spec = checkpoint.tensor(name).spec
            if spec.dtype not in FLOAT_CODES or spec.rows != self.rows:
                raise Unsupported("is no table of floating-point rows, one for each token", where=name,
                                  expected=f"{self.rows} rows", found=spec,
                                  remedy="use the unquantised model, or fetch the checkpoint again")  # fmt: skip
        if tokenizer.rows > self.rows:
            raise InputError(
                "the tokenizer has ids beyond the embedding's rows", where=tokenizer.label,
                expected=f"ids below {self.rows}", found=tokenizer.rows - 1, remedy="use the tokenizer of the weights",
            )  # fmt: skip


def _own_head(checkpoint: Checkpoint, architecture: Architecture, embeddings: str) -> str | None:
    head = architecture.slot("lm_head").tensor
    return head if head != embeddings and head in checkpoint.specs else None


def _bias(checkpoint: Checkpoint, architecture: Architecture) -> str | None:
    bias = architecture.slot("lm_head").tensor.removesuffix("weight") + "bias"
    return bias if bias in checkpoint.specs else None


def _tall(checkpoint: Checkpoint, embeddings: str, axes: int) -> str | None:
    """The tensor beside the embeddings that has a row, or a number, for each token; None without.

    Those of layers and positions may have as many by chance.
    """
    shape = checkpoint.specs[embeddings].shape[:axes]
    beside = (name for name in checkpoint.specs if name != embeddings and not _ELSEWHERE.search(name))
    found = [name for name in beside if checkpoint.specs[name].shape == shape]
    if len(found) > 1:
        raise Unsupported("several tensors may have a row for each token", where=", ".join(found), expected="one",
                          remedy="this model has more tables than embeddings and a head")  # fmt: skip
    return found[0] if found else None
