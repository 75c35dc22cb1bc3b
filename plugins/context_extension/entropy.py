"""Attention entropy against the position, layer by layer: curves, a table and plots.

2401.07004, section 3.1: inside the window the entropy of most layers hardly depends on the position, while that of the
first two grows with it. The scale of the logits is to keep it so beyond. Means are over the entropies of rows: the
reference code takes the entropy of mean weights, of one head, after a second softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean
from typing import Any

from regraft.core.checkpoint import FileRef

POINTS = 48
"""Of a curve."""

ROWS = 8
"""Positions that a point is the mean of."""

_AROUND = 3
_SHOWN = 8
_DECIMALS = 5
_NEAR_UNIFORM = 2
"""First layers whose attention is nearly uniform, by the paper."""


@dataclass(frozen=True)
class Curves:
    """Entropy of a model's attention.

    Args:
        positions: [points] mean position of each point.
        layers: [layers][points] in nats: means over rows, heads and texts.
    """

    positions: tuple[float, ...]
    layers: tuple[tuple[float, ...], ...]

    def level(self, position: int) -> float:
        """Around `position`: mean of the three nearest points, over the inner layers."""
        points = sorted(range(len(self.positions)), key=lambda index: abs(self.positions[index] - position))[:_AROUND]
        return fmean(layer[point] for layer in self.inner for point in points)

    @property
    def averaged(self) -> str:
        """Over which layers means are."""
        return f"layers from {_NEAR_UNIFORM}" if len(self.layers) > _NEAR_UNIFORM else "all layers"

    @property
    def inner(self) -> Sequence[Sequence[float]]:
        """The layers behind the first two, or all if there are no more."""
        return self.layers[_NEAR_UNIFORM:] or self.layers


def curves(model: Any, texts: Iterator[Sequence[int]], length: int) -> Curves:
    """Measure a model.

    Args:
        model: a causal language model of transformers, in eval mode.
        texts: token ids, `length` of each, one text at a time.
        length: tokens.

    Raises:
        Unsupported: its attention cannot be seen.
        ResourceError: out of memory.
    """
    import torch

    from regraft.core.measures.attention_entropy import attention_entropy

    groups = rows_of(length)
    rows = [row for group in groups for row in group]
    sizes = [len(group) for group in groups]
    total, count = torch.zeros(()), 0
    for ids in texts:
        by_point = torch.split(attention_entropy(model, ids, rows).double().mean(1), sizes, dim=-1)
        total = total + torch.stack([point.mean(-1) for point in by_point], dim=-1)
        count += 1
    values = (total / count).tolist()
    layers = tuple(tuple(round(value, _DECIMALS) for value in layer) for layer in values)
    return Curves(tuple(fmean(group) for group in groups), layers)


def rows_of(length: int) -> list[list[int]]:
    """The positions that each point of a curve is the mean of: spread over the whole length, the last one included."""
    points = min(POINTS, length)
    edges = [length * point // points for point in range(points + 1)]
    return [
        sorted({stop - 1 - (stop - start) * row // min(ROWS, stop - start) for row in range(min(ROWS, stop - start))})
        for start, stop in pairwise(edges)
    ]


def entropy_figures(measured: Mapping[str, Curves], window: int) -> dict[str, Any]:
    """The entropy at the end of the window and of the text, mean over layers; for the metrics.

    Args:
        measured: by the name of the model, such as `before`.
        window: the length the model was trained on.
    """
    return {
        name: {
            "at_window": round(one.level(window - 1), _DECIMALS),
            "at_target": round(one.level(math.ceil(one.positions[-1])), _DECIMALS),
        }
        for name, one in measured.items()
    }


def entropy_reports(measured: Mapping[str, Curves]) -> dict[str, FileRef]:
    """`entropy.csv`; a plot of the means, and one of the layers for each model."""
    from regraft.core.plots import line_chart

    chart = partial(line_chart, x="position", y="attention entropy (nats)")
    averaged = next(iter(measured.values())).averaged
    means = {name: (one.positions, [fmean(point) for point in zip(*one.inner, strict=True)])
             for name, one in measured.items()}  # fmt: skip
    plots = {"entropy.png": chart(means, title=f"attention entropy, mean of {averaged}")}
    for name, one in measured.items():
        layers = {f"layer {index}": (one.positions, one.layers[index]) for index in _shown(len(one.layers))}
        plots[f"entropy-{name}.png"] = chart(layers, title=f"attention entropy, {name}")
    return {"entropy.csv": FileRef(data=_table(measured)), **{name: FileRef(data=png) for name, png in plots.items()}}


def _table(measured: Mapping[str, Curves]) -> bytes:
    lines = ["model,layer,position,entropy"]
    for name, one in measured.items():
        for number, layer in enumerate(one.layers):
            pairs = zip(one.positions, layer, strict=True)
            lines += [f"{name},{number},{position:g},{value}" for position, value in pairs]
    return ("\n".join(lines) + "\n").encode()


def _shown(layers: int) -> list[int]:
    """Layers for a plot: all, or some from the first to the last."""
    count = min(layers, _SHOWN)
    return [round(index * (layers - 1) / max(1, count - 1)) for index in range(count)]
