"""What a step has left in `regraft/STEP/` of an output: losses, maps of heads, pictures, samples, tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from regraft.core.buffers import unreadable
from regraft.core.errors import InputError
from regraft.core.jsonio import parse_json, parse_object
from regraft.core.report.chart import LineChart, line_chart
from regraft.core.report.figures import Figures, figures, paired
from regraft.core.report.heat_map import Cell, HeatMap, heat_map
from regraft.core.report.numbers import nbytes, number
from regraft.core.report.pictures import TYPES, Picture, picture
from regraft.core.sources.folder import REPORTS

_LOSSES, _LOSS_PICTURE, _HEADS = "losses.jsonl", "loss.png", "heads.json"
_LONGEST_TEXT = 40_000
_MOST_ROWS = 200


@dataclass(frozen=True)
class Text:
    """A text of a step: a sample, or a JSON file; `more` characters are left out."""

    name: str
    text: str
    more: int = 0


@dataclass(frozen=True)
class Table:
    """A CSV file of a step; `more` rows are left out."""

    name: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    more: int = 0


@dataclass(frozen=True)
class StepReport:
    """Everything about one step that it has left behind."""

    figures: Figures
    charts: tuple[LineChart, ...] = ()
    maps: tuple[HeatMap, ...] = ()
    pictures: tuple[Picture, ...] = ()
    samples: tuple[Text, ...] = ()
    tables: tuple[Table, ...] = ()
    documents: tuple[Text, ...] = ()
    other: tuple[tuple[str, str], ...] = ()


def step_report(folder: Path, step: str, metrics: Mapping[str, Any]) -> StepReport:
    """Gather what `step` has left in the output `folder`.

    Args:
        folder: of the output.
        step: its id.
        metrics: its metrics in the lock file.

    Raises:
        InputError: a report cannot be read, or is not what its name says.
    """
    files = {path.name: path for path in _files(folder, step)}
    charts = [chart for name, path in files.items() if name.endswith(_LOSSES) and (chart := _losses(path, metrics))]
    drawn = {name.replace(_LOSSES, _LOSS_PICTURE) for name in files if name.endswith(_LOSSES)} if charts else set()
    heads = [head_map for name, path in files.items() if name == _HEADS and (head_map := _heads(path))]
    if heads:
        drawn.add("heads.png")
    rest = {name: path for name, path in files.items() if name not in drawn and not name.endswith(_LOSSES)}
    kinds: dict[str, list[Path]] = {}
    for name, path in rest.items():
        kinds.setdefault(PurePosixPath(name).suffix.lower(), []).append(path)
    pictures = [_picture(path, step) for path in sorted(rest.values(), key=_in_time) if path.suffix.lower() in TYPES]
    told = {*TYPES, ".md", ".txt", ".csv", ".json"}
    return StepReport(
        figures(metrics), tuple(charts), tuple(heads), tuple(pictures),
        tuple(_text(path) for path in [*kinds.get(".md", ()), *kinds.get(".txt", ())]),
        tuple(_table(path) for path in kinds.get(".csv", ())),
        tuple(_text(path) for path in kinds.get(".json", ())),
        tuple((name, nbytes(path.stat().st_size)) for name, path in rest.items() if path.suffix.lower() not in told),
    )  # fmt: skip


def _files(folder: Path, step: str) -> list[Path]:
    """Plain files of the step; its id comes out of the lock file, which is not to lead out of the folder."""
    place = folder / REPORTS / step
    if PurePosixPath(step).name != step or step in ("", "..") or not place.is_dir() or place.is_symlink():
        return []
    return sorted(path for path in place.iterdir() if path.is_file() and not path.is_symlink())


def _in_time(path: Path) -> str:
    """Orders pictures by name, but what is named `before` stands in front of what is named `after`."""
    return path.stem.replace("before", "0").replace("after", "1")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None


def _picture(path: Path, step: str) -> Picture:
    name = path.stem.replace("-", " ").replace("_", " ")
    return picture(name, _read(path), path.suffix.lower(), alt=f"{name}: a picture made by the step {step}")


def _losses(path: Path, metrics: Mapping[str, Any]) -> LineChart | None:
    prefix = path.name.removesuffix(_LOSSES).rstrip("-")
    points = []
    for at, line in enumerate(_read(path).splitlines(), 1):
        where = f"{path}:{at}"
        row = parse_object(line, where)
        step, loss = _float(row.get("step")), _float(row.get("loss"))
        if step is None or loss is None:
            raise InputError("is no line of losses", where=where, expected='{"step": 1, "loss": 2.5}',
                             remedy="write the checkpoint again")  # fmt: skip
        points.append((step, loss))
    last = points[-1][0] if points else 0.0
    held = _held_out(metrics, prefix)
    dots = [(0.0, held[0], "held out, before"), (last, held[1], "held out, after")] if held else []
    title = f"Loss in nats by step, {prefix}" if prefix else "Loss in nats by step"
    return line_chart(points, dots, title=title, x="step", y="loss")


def _float(item: Any) -> float | None:
    """A number; None for anything else, and for an integer that is greater than any float."""
    try:
        return float(item) if isinstance(item, int | float) else None
    except OverflowError:
        return None


def _held_out(metrics: Mapping[str, Any], prefix: str) -> tuple[float, float] | None:
    """The held-out loss before and after a training, where exactly one is told."""
    pairs, _ = paired(metrics)
    found = [
        (float(before), float(after))
        for key, (before, after) in pairs.items()
        if (parts := key.split("."))[-1] == "loss" and "held_out" in parts and (not prefix or parts[0] == prefix)
        and isinstance(before, int | float) and isinstance(after, int | float)
    ]  # fmt: skip
    return found[0] if len(found) == 1 else None


def _heads(path: Path) -> HeatMap | None:
    """The map of heads in a heads.json that has scores; see `regraft.core.head_file`."""
    document = parse_object(_read(path), path)
    scores, chosen = document.get("scores"), document.get("heads")
    if not isinstance(scores, list) or not isinstance(chosen, list):
        return None
    marked = {(head[0], head[1]) for head in chosen if isinstance(head, list) and list(map(type, head)) == [int, int]}
    cells = dict(_scored(scores, marked))
    if not cells:
        return None
    count = 1 + max(head for _, head in cells)
    scoring = document.get("scoring")
    return heat_map(
        cells, title=f"Heads by {scoring}" if isinstance(scoring, str) else "Scores of the heads",
        rows=[f"layer {layer}" for layer in range(len(scores))], columns=count, row_name="layer", column_name="head",
        log=False, kinds={"k-copied": "not scored"},
    )  # fmt: skip


def _scored(scores: list[Any], marked: set[tuple[Any, ...]]) -> Iterator[tuple[tuple[str, int], Cell]]:
    for layer, row in enumerate(scores):
        for head, score in enumerate(row if isinstance(row, list) else ()):
            value = _float(score)
            told = "not scored" if value is None else number(value)
            chosen = (layer, head) in marked
            yield (
                (f"layer {layer}", head),
                Cell(f"{told}, chosen" if chosen else told, value, "k-copied", mark=chosen),
            )


def _text(path: Path) -> Text:
    text = _read(path).decode("utf-8", "replace")
    if path.suffix.lower() == ".json":
        text = json.dumps(parse_json(text.encode(), path), ensure_ascii=False, indent=1)
    return Text(path.name, text[:_LONGEST_TEXT], max(0, len(text) - _LONGEST_TEXT))


def _table(path: Path) -> Table:
    try:
        rows = [tuple(row) for row in csv.reader(io.StringIO(_read(path).decode("utf-8", "replace")), strict=False)]
    except csv.Error as error:
        raise InputError("is no table", where=path, found=error, remedy="write the checkpoint again") from None
    heads, body = (rows[0], rows[1:]) if rows else ((), [])
    return Table(path.name, heads, tuple(body[:_MOST_ROWS]), max(0, len(body) - _MOST_ROWS))
