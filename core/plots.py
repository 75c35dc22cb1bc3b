"""The few plots that steps put into their reports: PNG, the same bytes for the same values."""

from __future__ import annotations

import io
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLE = {
    "figure.figsize": (7.0, 4.0), "figure.dpi": 110, "font.family": "DejaVu Sans", "font.size": 9.0, "axes.grid": True,
    "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3, "lines.linewidth": 1.2,
    "text.usetex": False, "svg.hashsalt": "regraft",
}  # fmt: skip
_MOST_LEGEND = 12
_MOST_TICKS = 24
_FLAT_LABELS = 6


def loss_curve(losses: Sequence[float], *, title: str, held_out: Mapping[int, float] | None = None) -> bytes:
    """Loss over steps, which count from 1.

    Args:
        losses: in nats, of every step.
        title: of the plot.
        held_out: held-out losses, by the number of steps done before.
    """
    with _axes() as (axes, png):
        axes.plot(range(1, len(losses) + 1), losses, marker="." if len(losses) < 2 else None, label="training")
        if held_out:
            axes.plot(list(held_out), list(held_out.values()), marker="o", linestyle="--", label="held out")
            axes.legend()
        axes.set(title=title, xlabel="step", ylabel="loss")
    return png.getvalue()


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str, x: str, y: str, log_x: bool = False
) -> bytes:
    """Lines by name, each an x and a y for every point; many lines are coloured from dark to light, first to last."""
    with _axes() as (axes, png):
        colours = _colours(len(series))
        for (name, (xs, ys)), colour in zip(series.items(), colours, strict=True):
            axes.plot(xs, ys, label=name, color=colour)
        if 1 < len(series) <= _MOST_LEGEND:
            axes.legend()
        elif series:
            axes.legend(*_ends(axes))
        if log_x:
            axes.set_xscale("log")
        axes.set(title=title, xlabel=x, ylabel=y)
    return png.getvalue()


def heat_map(
    values: Sequence[Sequence[float]],
    *,
    title: str,
    x: str,
    y: str,
    x_ticks: Sequence[str] | None = None,
    y_ticks: Sequence[str] | None = None,
    marks: Sequence[tuple[int, int]] = (),
    bounds: tuple[float, float] | None = None,
) -> bytes:
    """A table of numbers as colours, rows from top to bottom.

    Args:
        values: [rows, columns]; a NaN stays white.
        title: of the plot.
        x, y: what columns and rows are.
        x_ticks, y_ticks: names of the columns and rows; without, their numbers from 0.
        marks: (row, column) of cells that get a frame.
        bounds: of the colours; without, the least and the greatest value.
    """
    from matplotlib.patches import Rectangle

    low, high = bounds or (None, None)
    with _axes() as (axes, png):
        image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
        for row, column in marks:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=1.2))
        axes.figure.colorbar(image, ax=axes)
        axes.grid(visible=False)
        axes.set(title=title, xlabel=x, ylabel=y)
        _name_ticks(axes.xaxis, x_ticks)
        _name_ticks(axes.yaxis, y_ticks)
    return png.getvalue()


def fan_chart(
    history: Sequence[float],
    actual: Sequence[float],
    median: Sequence[float],
    bands: Mapping[float, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    x: str,
    y: str,
    first: int = 0,
) -> bytes:
    """A forecast as a fan: what was known, the median and central intervals, and what came.

    Args:
        history: values before the forecast.
        actual: [H] what came.
        median: [H].
        bands: lower and upper ends [H] of intervals, by their level; wide ones are pale.
        title: of the plot.
        x, y: what the axes are.
        first: where the history begins on the x axis.
    """
    origin = first + len(history)
    last = list(history[-1:])  # where the fan begins
    ahead = range(origin - len(last), origin + len(median))
    with _axes() as (axes, png):
        from matplotlib import colormaps

        axes.plot(range(first, origin), history, color="black", label="known")
        for number, level in enumerate(sorted(bands, reverse=True), start=1):
            low, high = bands[level]
            colour = colormaps["Blues"](0.5 * number / len(bands))
            axes.fill_between(
                ahead, [*last, *low], [*last, *high], color=colour, linewidth=0, label=f"{level:.0%}", zorder=1.5
            )
        axes.plot(ahead, [*last, *median], color="C0", label="median")
        axes.plot(ahead, [*last, *actual], color="C3", linestyle="--", label="what came")
        axes.legend()
        axes.set(title=title, xlabel=x, ylabel=y)
    return png.getvalue()


def bar_chart(groups: Mapping[str, Mapping[str, float]], *, title: str, y: str) -> bytes:
    """Groups of bars side by side, one bar in each for every series.

    Args:
        groups: height by series, by group; all groups have the same series.
        title: of the plot.
        y: what the heights are.
    """
    series = list(next(iter(groups.values()), {}))
    width = 0.8 / max(1, len(series))
    with _axes() as (axes, png):
        for number, name in enumerate(series):
            places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(groups))]
            axes.bar(places, [group[name] for group in groups.values()], width, label=name)
        axes.set_xticks(range(len(groups)), list(groups), rotation=45 if len(groups) > _FLAT_LABELS else 0)
        if len(series) > 1:
            axes.legend()
        axes.set(title=title, ylabel=y)
    return png.getvalue()


@contextmanager
def _axes() -> Iterator[tuple[Axes, io.BytesIO]]:
    """Axes of a figure, and where its PNG stands once the block has ended."""
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    png = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE}):
        figure = Figure(layout="constrained")
        yield figure.add_subplot(), png
        figure.savefig(png, format="png", metadata={"Software": None})


def _matplotlib() -> Any:
    """matplotlib, imported so that it neither speaks nor needs a home folder that can be written."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    if "MPLCONFIGDIR" not in os.environ and not os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111 - no home, no error
        os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="regraft-matplotlib-")
    import matplotlib

    return matplotlib


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= _MOST_LEGEND:
        return [f"C{number % 10}" for number in range(count)]
    return [colormaps["viridis"](number / (count - 1)) for number in range(count)]


def _ends(axes: Axes) -> tuple[list[Any], list[str]]:
    """The first and the last line, for a legend that would otherwise be too long."""
    handles, labels = axes.get_legend_handles_labels()
    return ([handles[0], handles[-1]], [labels[0], labels[-1]]) if len(handles) > 1 else (handles, labels)


def _name_ticks(axis: Any, names: Sequence[str] | None) -> None:
    from matplotlib.ticker import MaxNLocator

    if names is None:
        axis.set_major_locator(MaxNLocator(integer=True))
        return
    every = -(-len(names) // _MOST_TICKS)
    axis.set_ticks(range(0, len(names), every), labels=list(names[::every]))
