"""Answers to passkey prompts over length and depth: shares, a table and heat maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from regraft.core.checkpoint import FileRef
from regraft.core.measures.passkey import Answer, Passkeys, ask
from regraft.plugins.context_extension.settings import ProbeSettings

_DECIMALS = 4


@dataclass(frozen=True)
class Sweep:
    """Answers by length and depth.

    Args:
        lengths: of the prompts, in tokens.
        depths: share of the text before the key.
        cells: [lengths][depths] the answers of all samples.
    """

    lengths: Sequence[int]
    depths: Sequence[float]
    cells: Sequence[Sequence[Sequence[Answer]]]

    @property
    def answers(self) -> Iterator[tuple[int, float, Answer]]:
        """Each with its length and depth."""
        for length, row in zip(self.lengths, self.cells, strict=True):
            for depth, cell in zip(self.depths, row, strict=True):
                yield from ((length, depth, answer) for answer in cell)


def sweep(model: Any, passkeys: Passkeys, lengths: Sequence[int], tell: Callable[[str], None]) -> Sweep:
    """Ask a model at every length and depth, one prompt at a time.

    Raises:
        InputError, Unsupported: as `Passkeys.prompt`.
        ResourceError: out of memory.
    """
    settings, cells = passkeys.settings, []
    for length in lengths:
        tell(f"passkey: {len(settings.depths) * settings.samples} texts of {length} tokens")
        cells.append(
            [
                [ask(model, passkeys.tokenizer, passkeys.prompt(length, depth, number))
                 for number in range(settings.samples)]
                for depth in settings.depths
            ]
        )  # fmt: skip
    return Sweep(lengths, settings.depths, cells)


def sweep_figures(measured: Mapping[str, Sweep], window: int) -> dict[str, Any]:
    """Shares of prompts, inside the window and beyond, for the metrics; None where there are no such prompts."""
    return {name: {"inside": _shares(one, 0, window), "beyond": _shares(one, window, None)}
            for name, one in measured.items()}  # fmt: skip


def sweep_reports(measured: Mapping[str, Sweep], settings: ProbeSettings) -> dict[str, FileRef]:
    """`passkey.csv`, and a heat map for each model."""
    from regraft.core.plots import heat_map

    reports = {"passkey.csv": FileRef(data=_table(measured))}
    for name, one in measured.items():
        by_depth = [[_first(cell) for cell in column] for column in zip(*one.cells, strict=True)]
        reports[f"passkey-{name}.png"] = FileRef(
            data=heat_map(
                by_depth,
                title=f"passkey is the likeliest of {settings.choices}, {name}",
                x="length (tokens)",
                y="depth",
                x_ticks=[str(length) for length in one.lengths],
                y_ticks=[f"{depth:.0%}" for depth in one.depths],
                bounds=(0.0, 1.0),
            )
        )
    return reports


def _first(cell: Sequence[Answer]) -> float:
    return fmean(answer.rank == 1 for answer in cell)


def _shares(one: Sweep, above: int, most: int | None) -> dict[str, float] | None:
    found = [answer for length, _, answer in one.answers if length > above and (most is None or length <= most)]
    if not found:
        return None
    return {
        "likeliest": round(_first(found), _DECIMALS),
        "told": round(fmean(answer.told for answer in found), _DECIMALS),
        "mean_rank": round(fmean(answer.rank for answer in found), _DECIMALS),
    }


def _table(measured: Mapping[str, Sweep]) -> bytes:
    lines = ["model,length,depth,rank,told"]
    for name, found in measured.items():
        lines += [f"{name},{length},{depth:g},{one.rank},{int(one.told)}" for length, depth, one in found.answers]
    return ("\n".join(lines) + "\n").encode()
