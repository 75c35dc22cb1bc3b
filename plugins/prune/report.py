"""What the step leaves behind: figures of every matrix, pictures by layer and role, the masks if asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from safetensors.torch import save

from regraft.core.checkpoint import FileRef
from regraft.core.jsonio import dump
from regraft.core.plots import heat_map
from regraft.plugins.prune.masks import Figures, Masks
from regraft.plugins.prune.places import Places


def reports(masks: Masks, places: Places) -> dict[str, FileRef]:
    """The files, by name."""
    files = {"prune.json": dump({name: _one(figures) for name, figures in masks.figures.items()})}
    files["lost.png"] = _picture(masks, places, lambda one: one.lost, "share of the squared scores that is pruned")
    if any(figures.iou for figures in masks.figures.values()):
        files["iou.png"] = _picture(masks, places, _mean_iou, "intersection over union of the tasks' masks")
    if masks.bits:
        files["masks.safetensors"] = save(dict(masks.bits))
    return {name: FileRef(data=data) for name, data in files.items()}


def metrics(masks: Masks) -> dict[str, Any]:
    """For the lock file and the model card."""
    found = masks.figures.values()
    zeros, size = sum(one.zeros for one in found), sum(one.size for one in found)
    figures: dict[str, Any] = {"matrices": len(found), "pruned": zeros, "of": size, "sparsity": _number(zeros / size)}
    figures["mean_lost"] = _mean(one.lost for one in found)
    pairs = {pair for one in found for pair in one.iou}
    if pairs:
        figures["iou"] = {pair: _mean(one.iou[pair] for one in found) for pair in sorted(pairs)}
    return figures


def notes(masks: Masks, combine: str) -> list[str]:
    """Sentences for the user."""
    figures = metrics(masks)
    zeros = f"{figures['pruned']:,} of {figures['of']:,} weights of {figures['matrices']} matrices are 0"
    lost = f"{figures['mean_lost']:.2%} of their squared scores went with them on average"
    lines = [f"{zeros} ({figures['sparsity']:.1%}); {lost}"]
    if "iou" in figures:
        values = list(figures["iou"].values())
        overlap = f"{min(values):.3f}" if len(values) == 1 else f"{min(values):.3f} to {max(values):.3f}"
        lines.append(f"the tasks' masks overlap by {overlap} (intersection over union); shared by {combine}")
    return lines


def _one(figures: Figures) -> dict[str, Any]:
    one: dict[str, Any] = {"pruned": figures.zeros, "of": figures.size, "lost": _number(figures.lost)}
    return {**one, "iou": {pair: _number(value) for pair, value in figures.iou.items()}} if figures.iou else one


def _picture(masks: Masks, places: Places, value: Callable[[Figures], float], title: str) -> bytes:
    """Layers by roles; experts of a layer as their mean, what is not pruned white."""
    roles = list(dict.fromkeys(matrix.role for matrix in places.matrices))
    cells: dict[tuple[int, str], list[float]] = {}
    for matrix in places.matrices:
        cells.setdefault((matrix.layer, matrix.role), []).append(value(masks.figures[matrix.name]))
    rows = [
        [_mean(cells.get((layer, role), [float("nan")])) for role in roles]
        for layer in range(places.architecture.num_layers)
    ]
    return heat_map(rows, title=title, x="projection", y="layer", x_ticks=roles)


def _mean_iou(figures: Figures) -> float:
    return _mean(figures.iou.values())


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return _number(sum(numbers) / len(numbers))


def _number(value: float) -> float:
    return float(f"{value:.9g}")
