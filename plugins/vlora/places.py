"""The tensors of a language model that deltas change: fused or not, transposed or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.core.architectures import Architecture
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.plugins.vlora.settings import ROLES, GeneratorSettings, sizes_in

if TYPE_CHECKING:
    import torch

Key = tuple[str, int]
"""Type and layer."""


@dataclass(frozen=True)
class Share:
    """What one type changes of a tensor.

    Args:
        key: type and layer.
        rows: runs of output features, in the type's own order.
    """

    key: Key
    rows: tuple[slice, ...]


@dataclass(frozen=True)
class Place:
    """A tensor that gets a delta.

    Args:
        spec: as the checkpoint stores it, [outputs, inputs], or the reverse if `transposed`.
        shares: types that change it; several where projections are fused.
        rank: of each share's delta.
        transposed: stored as (in_features, out_features).
    """

    spec: TensorSpec
    shares: tuple[Share, ...]
    rank: int
    transposed: bool

    @property
    def total_rank(self) -> int:
        """Rank of the delta of the whole tensor."""
        return self.rank * len(self.shares)

    def factors(self, pairs: Mapping[Key, tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """L [rows, k] and R [k, columns] with L R the delta of the stored tensor, without the scale.

        Roles that share a tensor keep to their own output features: their B stand in blocks of an otherwise empty
        matrix, and k is the sum of their ranks.

        Args:
            pairs: A [d_in, r] and B [d_out, r] by type and layer.
        """
        import torch

        inputs = torch.cat([pairs[share.key][0] for share in self.shares], dim=1)
        rows = self.spec.shape[1 if self.transposed else 0]
        outputs = inputs.new_zeros(rows, self.total_rank)
        for number, share in enumerate(self.shares):
            columns = slice(number * self.rank, (number + 1) * self.rank)
            B, start = pairs[share.key][1], 0
            for run in share.rows:
                length = run.stop - run.start
                outputs[run, columns] = B[start : start + length].to(outputs.dtype)
                start += length
        left, right = (inputs, outputs.T) if self.transposed else (outputs, inputs.T)
        return left.contiguous(), right.contiguous()


def places_of(
    checkpoint: Checkpoint, architecture: Architecture, settings: GeneratorSettings, types: str
) -> list[Place]:
    """Where the deltas of `types` go, `m` aside, in the order of layers.

    Raises:
        Unsupported: a weight is in a dtype that cannot be computed with.
        InputError: a weight is missing, or of another shape than the config says.
    """
    shares: dict[str, list[Share]] = {}
    found: dict[str, Place] = {}
    for layer in settings.active_layers:
        for letter in (letter for letter in types if letter in ROLES):
            slot = architecture.slot(ROLES[letter], layer)
            spec = _spec(checkpoint, slot.tensor, slot.shape)
            shares.setdefault(slot.tensor, []).append(Share((letter, layer), slot.rows))
            found[slot.tensor] = Place(spec, tuple(shares[slot.tensor]), settings.rank, slot.transposed)
    return list(found.values())


def check_model(settings: GeneratorSettings, architecture: Architecture, label: str) -> None:
    """Refuse a generator for another model.

    Args:
        settings: of the generator.
        architecture: of the language model.
        label: of the generator, for the message.

    Raises:
        InputError: layers, sizes or the family differ.
    """
    wanted = f"{settings.model_type or 'any family'}, {settings.num_layers} layers"
    found = f"{architecture.model_type}, {architecture.num_layers} layers"
    if settings.num_layers == architecture.num_layers and settings.model_type in (None, architecture.model_type):
        sizes = sizes_in(architecture, settings.types, settings.active_layers)
        own = {letter: (settings.inputs[letter], settings.outputs[letter]) for letter in settings.types}
        if sizes == own:
            return
        letter = next(letter for letter in settings.types if sizes[letter] != own[letter])
        wanted += f", {letter}: {own[letter][0]} to {own[letter][1]} features"
        found += f", {letter}: {sizes[letter][0]} to {sizes[letter][1]} features"
    raise InputError(
        "the generator was made for another model", where=label, expected=wanted, found=found,
        remedy="use the model that it was trained with, or train one for this model (vlora-train)",
    )  # fmt: skip


def _spec(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> TensorSpec:
    spec = checkpoint.tensor(name).spec
    if spec.shape != shape:
        raise InputError("a tensor has another shape than the config says", where=f"{checkpoint.label}: {name}",
                         expected=list(shape), found=list(spec.shape), remedy="correct config.json")  # fmt: skip
    if spec.dtype not in FLOAT_CODES:
        raise Unsupported("a tensor that an image changes is in a dtype that cannot be computed with",
                          where=f"{checkpoint.label}: {name}", expected=", ".join(sorted(FLOAT_CODES)),
                          found=spec.dtype, remedy="use an unquantised base")  # fmt: skip
    return spec
