"""The base model as an adapter names it: from module paths of the stock class to tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from regraft.core.architectures import Architecture, Slot, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, Unsupported
from regraft.core.host import host
from regraft.core.specs import TensorSpec

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
_HEAD = "lm_head"


@dataclass(frozen=True)
class Place:
    """Where a module's weight stands.

    Args:
        tensor: name in the output.
        source: the tensor of the base whose values it has: another one only for a head that is tied.
        bias: name of the bias; None if the base stores none.
        transposed: stored as (in_features, out_features).
    """

    tensor: str
    source: str
    bias: str | None = None
    transposed: bool = False


class BaseModel:
    """A checkpoint with its architecture; a family that nobody knows goes by the names of its tensors alone.

    Args:
        checkpoint: the base.
        transposed: whether a family that nobody knows stores its weights as (in_features, out_features).
    """

    def __init__(self, checkpoint: Checkpoint, *, transposed: bool = False) -> None:
        self.checkpoint = checkpoint
        self.specs = checkpoint.specs
        self._transposed = transposed

    @cached_property
    def architecture(self) -> Architecture | None:
        """The roles of the checkpoint; None for a family that neither regraft nor transformers knows."""
        return self._architecture(self.checkpoint.config)

    def _architecture(self, config: Mapping[str, Any]) -> Architecture | None:
        try:
            return architecture_of(config, self.specs, families=host().architectures())
        except Unsupported:
            return None

    @property
    def tied(self) -> bool:
        """Whether the config says that the head is the embeddings."""
        if self.architecture is not None:
            return self.architecture.tie_word_embeddings
        return bool(self.checkpoint.config.get("tie_word_embeddings")) and f"{_HEAD}.weight" not in self.specs

    @cached_property
    def embeddings(self) -> str | None:
        """The tensor of the input embeddings."""
        if self.architecture is not None:
            return self.architecture.slot("embed_tokens").tensor
        return next((name for name in self.specs if name.removesuffix(".weight").split(".")[-1] in _EMBEDDINGS), None)

    @cached_property
    def head(self) -> str:
        """The tensor of the output head: for a tied head the name that it has once it is untied."""
        config = {**self.checkpoint.config, "tie_word_embeddings": False}
        untied = self._architecture(config) if self.tied else self.architecture
        if untied is None or untied.headless:
            return f"{_HEAD}.weight"
        return untied.slot("lm_head").tensor

    def place(self, path: str) -> Place | None:
        """Where the module at `path` stands; None if the base has no such module, or no tensor for it alone."""
        slot = self._slot(path)
        if slot is not None:
            return self._place_of(slot)
        if path == _HEAD and self.tied and self.embeddings:
            return Place(self.head, self.embeddings)
        tensor = f"{path}.weight"
        if tensor not in self.specs:
            return None
        transposed = self._transposed and self.architecture is None and len(self.specs[tensor].shape) == 2
        return Place(tensor, tensor, self._stored_bias(tensor), transposed)

    def _slot(self, path: str) -> Slot | None:
        if self.architecture is None:
            return None
        try:
            return self.architecture.slot_of_module(path)
        except InputError:
            return None

    def _place_of(self, slot: Slot) -> Place | None:
        if slot.tensor not in self.specs:
            return None
        tensor = self.head if slot.tied and slot.role == _HEAD else slot.tensor
        return Place(tensor, slot.tensor, self._stored_bias(slot.tensor), slot.transposed)

    def _stored_bias(self, tensor: str) -> str | None:
        bias = f"{tensor.removesuffix('.weight')}.bias"
        return bias if bias in self.specs else None

    def parameter(self, name: str) -> Place | None:
        """Where the parameter `name`, such as `model.norm.weight` or `transformer.h.0.ln_1.bias`, stands."""
        path, _, leaf = name.rpartition(".")
        place = self.place(path) if leaf in ("weight", "bias") else None
        if place is not None and leaf == "weight":
            return place
        if place is not None and place.bias is not None:
            return Place(place.bias, place.bias)
        return Place(name, name) if name in self.specs else None

    def experts(self, path: str) -> list[tuple[Slot, ...]] | None:
        """For each expert the slots behind a parameter, one below the other; None if it stacks no experts."""
        if self.architecture is None:
            return None
        try:
            return self.architecture.expert_tensors(path)
        except InputError:
            return None

    def spec(self, place: Place) -> TensorSpec:
        """The spec that a tensor has before the adapter changes it."""
        source = self.specs[place.source]
        return TensorSpec(place.tensor, source.dtype, source.shape)

    def nested(self) -> str:
        """Key of config.json under which the text model's config stands; empty if it stands at the top."""
        return "" if self.architecture is None else self.architecture.layout.family.nested
