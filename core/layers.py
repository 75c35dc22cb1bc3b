"""How recipes name layers: a number, several, or a range such as `8-12`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from regraft.core.errors import UsageError

LayerRange = Annotated[
    str, Field(pattern=r"^(\d{1,6}(-(\d{1,6})?)?|-\d{1,6})$", json_schema_extra={"format": "layer-range"})
]
"""`12-` from layer 12 on, `12-20` with both ends, `-20` up to it, or one number."""

_Number = Annotated[int, Field(ge=0)]
Layers = _Number | Annotated[tuple[_Number, ...], Field(min_length=1)] | LayerRange
"""A recipe's key for layers, which count from 0."""


def layers_of(given: int | tuple[int, ...] | str, num_layers: int) -> list[int]:
    """The layers that `given` means, each once, from the lowest to the highest.

    Raises:
        UsageError: the model does not have one of them, or a range ends before it begins.
    """
    if isinstance(given, str):
        first, dash, last = given.partition("-")
        start = int(first or 0)
        stop = (int(last) if last else num_layers - 1) if dash else start
        layers = list(range(start, stop + 1))
    else:
        layers = sorted({given} if isinstance(given, int) else set(given))
    if not layers or layers[-1] >= num_layers:
        raise UsageError(
            "there are no such layers",
            where="layers",
            expected=f"layers from 0 to {num_layers - 1}, the first before the last",
            found=given if isinstance(given, (int, str)) else list(given),
            remedy="name layers that the model has; they count from 0",
        )
    return layers
