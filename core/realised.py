"""How much of what the steps change arrives in a weight that is stored quantised.

    wanted = W' - W        kept = read back(quantised(W')) - W        cosine = <kept, wanted> / (|kept| |wanted|)

W is the base's weight as it is dequantised, W' what the steps make of it. A change below about half a quantisation step
leaves the codes as they are, and nothing of it arrives; the codes that do flip add noise of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regraft.core.errors import TransformationError

if TYPE_CHECKING:
    import torch

    from regraft.core.tensors import LazyTensor

Sums = tuple[float, float, float]
"""<kept, wanted>, |kept|², |wanted|²."""


@dataclass(frozen=True)
class Gauge:
    """Sums for one weight, told piece by piece while it is written.

    Args:
        base: the weight before the steps, fp32.
        pieces: the sums of each piece, by its first element or row: a piece that is computed twice counts once, and the
            order of adding does not depend on who computed first.
    """

    base: LazyTensor
    pieces: dict[int, Sums] = field(default_factory=dict)

    def add(self, first: int, wanted: torch.Tensor, kept: torch.Tensor) -> None:
        """Account for one piece; both in fp32, of the same shape."""
        wanted, kept = wanted.double().flatten(), kept.double().flatten()
        self.pieces[first] = (float(kept @ wanted), float(kept @ kept), float(wanted @ wanted))

    @property
    def sums(self) -> Sums:
        """Over the weight."""
        return _total([self.pieces[first] for first in sorted(self.pieces)])


@dataclass(frozen=True)
class Realised:
    """The gauges of an output.

    Args:
        form: how the weights are stored, for messages.
        gauges: by the name of the weight.
    """

    form: str = ""
    gauges: Mapping[str, Gauge] = field(default_factory=dict)

    def cosines(self) -> dict[str, float]:
        """The cosine of every weight that the steps change; 0 where nothing arrived."""
        return {name: _cosine(gauge.sums) for name, gauge in self.gauges.items() if gauge.sums[2] > 0}

    def total(self) -> float | None:
        """The cosine over all of them together; None if none changed."""
        sums = _total([gauge.sums for gauge in self.gauges.values()])
        return _cosine(sums) if sums[2] > 0 else None

    def metrics(self) -> dict[str, Any]:
        """For the lock file and reports; empty if no weight was measured."""
        total = self.total()
        if total is None:
            return {}
        return {"form": self.form, "realised_cosine": total, "realised_cosines": self.cosines()}

    def note(self) -> str | None:
        """One sentence, if a weight was measured."""
        total, cosines = self.total(), self.cosines()
        if total is None:
            return None
        worst = min(cosines, key=cosines.__getitem__)
        return (
            f"{len(cosines)} changed weights are quantised again ({self.form}): cosine of the stored change with the "
            f"one asked for {total:.3f} in all, {cosines[worst]:.3f} at worst ({worst})"
        )

    def check(self, minimum: float) -> None:
        """Refuse an output in which a changed weight falls below `minimum`.

        Raises:
            TransformationError: naming the worst weight, and what can be done.
        """
        cosines = self.cosines()
        short = [name for name, cosine in cosines.items() if not cosine >= minimum]
        if not short:
            return
        worst = min(short, key=cosines.__getitem__)
        raise TransformationError(
            f"the quantised form of the base ({self.form}) loses the change of {len(short)} of {len(cosines)} weights",
            where=worst,
            expected=f"a cosine of at least {minimum:g} between the stored change and the one asked for",
            found=f"{cosines[worst]:.3f}, and {self.total() or 0.0:.3f} over all weights",
            remedy='set [output] quantize = "none" to write dequantised weights, or format = "adapter" to keep '
            "low-rank changes beside the quantised base, or accept the loss with a lower minimum_cosine",
        )


def _total(sums: list[Sums]) -> Sums:
    return (
        math.fsum(each[0] for each in sums),
        math.fsum(each[1] for each in sums),
        math.fsum(each[2] for each in sums),
    )


def _cosine(sums: Sums) -> float:
    product, kept, wanted = sums
    return product / math.sqrt(kept * wanted) if kept > 0 else 0.0
