"""Training data from time series: windows of values as tokens, made by the code that the checkpoint brings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.data.examples import IGNORED, Example, ints
from regraft.core.data.load import Dataset, files_of
from regraft.core.data.series import Series, read_series
from regraft.core.errors import UsageError
from regraft.plugins.fourier_head.params import LearnSettings, SeriesSettings

_TOGETHER = 4096
"""Windows that are made into tokens at once."""


def check_window(checkpoint: Checkpoint, settings: SeriesSettings) -> None:
    """Refuse windows that the model has no positions for.

    Raises:
        UsageError: they are too long.
    """
    most = checkpoint.window
    needed = settings.context + settings.horizon
    if most is not None and needed > most:
        raise UsageError(
            "context and horizon together are longer than the model's window", where="series",
            expected=f"at most {most} values", found=f"{settings.context} + {settings.horizon}",
            remedy="lower one of them",
        )  # fmt: skip


@dataclass(frozen=True)
class SeriesData(Dataset):
    """Windows of series, and what share of their values lies beyond the bins."""

    clipped: float = 0.0

    def summary(self) -> dict[str, Any]:
        """As every data set's, with that share."""
        return {**super().summary(), "clipped": round(self.clipped, 6)}


def series_data(model: Any, learn: LearnSettings, settings: SeriesSettings, seed: int) -> SeriesData:
    """Windows as sequences of bins; those of one series have the same place.

    Args:
        model: with the head, of the exported class.
        learn: `data` names the files; `max_rows` draws that many windows.
        settings: how series are cut and scaled.
        seed: of the draw.

    Raises:
        InputError: a row is no series, or too short; a file cannot be read.
        UsageError: no column fits.
    """
    size = settings.context + settings.horizon
    why = f"context {settings.context} + horizon {settings.horizon}"
    why += f" + reserve {settings.reserve}" if settings.reserve else ""
    series, bad = read_series(learn.data, least=size + settings.reserve, why=why)
    places = [(one, start) for one in series for start in _starts(one, size, settings)]
    cut = len(places)
    if learn.data.max_rows is not None and cut > learn.data.max_rows:
        places = Random(seed).sample(places, learn.data.max_rows)
    examples, beyond = list[Example](), 0
    for number in range(0, len(places), _TOGETHER):
        made, clipped = _examples(model, places[number : number + _TOGETHER], size, settings)
        examples, beyond = examples + made, beyond + clipped
    counts = {
        "series": len(series), "bad_rows": len(bad.rows), "windows": cut, "sequences": len(examples),
        "tokens": size * len(examples), "learnt_tokens": sum(one.learnt for one in examples),
    }  # fmt: skip
    files = {str(path): FileRef(path=Path(path)).sha256() for source in learn.data.sources for path in files_of(source)}
    return SeriesData(examples, counts, tuple(bad.rows), files, beyond / counts["tokens"])


def _starts(series: Series, size: int, settings: SeriesSettings) -> Sequence[int]:
    """Where windows begin, in order; the last one ends where the reserve begins."""
    return range(len(series.values) - settings.reserve - size, -1, -settings.stride)[::-1]


def _examples(
    model: Any, places: Sequence[tuple[Series, int]], size: int, settings: SeriesSettings
) -> tuple[list[Example], int]:
    import torch

    rows = [torch.frombuffer(one.values, dtype=torch.float64)[start : start + size] for one, start in places]
    values = torch.stack(rows)
    tokens, location, scale = model.series_tokens(values, settings.context)
    edges = model.lm_head.edges(values.device)
    scaled = (values - location) / scale
    clipped = int(((scaled < edges[0]) | (scaled > edges[-1])).sum())
    first = settings.context if settings.learn == "horizon" else 0
    found = []
    for (one, _), ids in zip(places, tokens.tolist(), strict=True):
        found.append(Example(ints(ids), ints([IGNORED] * first + ids[first:]), one.place))
    return found, clipped
