"""What the loop asks of its data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Piece(Protocol):
    """A part of a step that is computed at once; `core.data.batches.Batch` is one."""

    @property
    def indices(self) -> Sequence[int]:
        """Which examples."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens, for the speed."""
        ...


class Steps(Protocol):
    """The data of each step, by its number; `core.data.batches.Batches` is one."""

    @property
    def rank(self) -> int:
        """This process."""
        ...

    @property
    def world(self) -> int:
        """How many processes there are."""
        ...

    def __len__(self) -> int:
        """Number of steps."""
        ...

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        ...

    def units(self, step: int) -> int:
        """What the step's summed loss is divided by."""
        ...

    def micro(self, step: int, device: str) -> Sequence[Any]:
        """The step's pieces."""
        ...

    def places(self, indices: Sequence[int]) -> Sequence[object]:
        """Where examples come from, for messages."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What decides the steps; JSON values."""
        ...
