"""What a step that measures leaves behind: the vectors as a file that `steer` reads, figures, a plot, the heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safetensors.torch import save

from regraft.core.architectures import Architecture
from regraft.core.checkpoint import FileRef
from regraft.core.head_file import HeadFile
from regraft.core.jsonio import dump
from regraft.core.plots import heat_map, line_chart
from regraft.plugins.steer.fit import Measured, Measurement, ranked
from regraft.plugins.steer.params import SteerParams

VECTORS = "vectors.safetensors"


def reports(measurement: Measurement, architecture: Architecture, params: SteerParams) -> dict[str, FileRef]:
    """The files, by name."""
    vectors = {place.name: measurement.places[place].vector for place in measurement.chosen}
    files = {VECTORS: save(vectors), "steering.json": dump(_figures(measurement, params))}
    if params.by_head:
        files["heads.json"] = _heads(measurement, architecture, params).as_bytes()
    if measurement.negative is not None and len(measurement.places) > 1:
        files["separability.png"] = _plot(measurement, architecture, params)
    return {name: FileRef(data=data) for name, data in files.items()}


def metrics(measurement: Measurement) -> dict[str, Any]:
    """For the lock file and the model card."""
    chosen = [measurement.places[place] for place in measurement.chosen]
    facts: dict[str, Any] = {"vectors": len(chosen), "positive": measurement.positive.summary()}
    if measurement.negative is not None:
        facts["negative"] = measurement.negative.summary()
    facts["mean_norm"] = _mean([one.norm for one in chosen])
    facts["mean_activation_norm"] = _mean([one.activation_norm for one in chosen])
    for name in ("accuracy", "cosine"):
        values = [value for one in chosen if (value := getattr(one, name)) is not None]
        if values:
            facts[f"mean_{name}"] = _mean(values)
    if measurement.entropies is not None:
        facts["mean_entropy"] = _number(float(measurement.entropies.mean()))
    return facts


def notes(measurement: Measurement, params: SteerParams) -> list[str]:
    """Sentences for the user."""
    figures = metrics(measurement)
    against = "their plain mean" if measurement.negative is None else f"{figures['negative']['prompts']} negative ones"
    lines = [f"{figures['positive']['prompts']} positive prompts against {against}, at {params.site}"]
    if "mean_accuracy" in figures:
        lines.append(
            f"the difference of means tells {figures['mean_accuracy']:.0%} of the prompts apart, each left out in turn"
        )
    lengths = figures["mean_norm"] * abs(params.strength) / (figures["mean_activation_norm"] or 1.0)
    lines.append(f"vectors times strength are {lengths:.3g} of the activations' length on average")
    zero = [place.name for place in measurement.chosen if measurement.places[place].norm == 0]
    if zero:
        lines.append(f"the prompts do not differ at {len(zero)} places, such as {zero[0]}: zero vectors")
    return lines


def _figures(measurement: Measurement, params: SteerParams) -> dict[str, Any]:
    given = params.model_dump(mode="json", include={"site", "position", "weighting", "normalise"})
    figures: dict[str, Any] = {**given, "places": {}}
    chosen = set(measurement.chosen)
    for place, one in measurement.places.items():
        figures["places"][place.name] = {"chosen": place in chosen, **_one(one)}
    if measurement.entropies is not None:
        figures["entropies"] = [_number(value) for value in measurement.entropies.tolist()]
    return figures


def _one(one: Measured) -> Mapping[str, float | None]:
    return {
        "norm": _number(one.norm),
        "difference": _number(one.difference),
        "activation_norm": _number(one.activation_norm),
        "accuracy": None if one.accuracy is None else _number(one.accuracy),
        "cosine": None if one.cosine is None else _number(one.cosine),
    }


def _heads(measurement: Measurement, architecture: Architecture, params: SteerParams) -> HeadFile:
    """The chosen heads, the best first; scores are accuracies."""
    columns = architecture.num_heads if params.site == "head" else architecture.num_kv_heads
    scores: list[list[float | None]] = [[None] * columns for _ in range(architecture.num_layers)]
    for place, one in measurement.places.items():
        assert place.head is not None
        scores[place.layer][place.head] = one.accuracy
    best = ranked({place: measurement.places[place] for place in measurement.chosen})
    heads = tuple((place.layer, place.head or 0) for place in best)
    site = "head" if params.site == "head" else "kv-group"
    return HeadFile(heads, site, "accuracy", architecture.num_layers, columns, scores)  # type: ignore[arg-type]


def _plot(measurement: Measurement, architecture: Architecture, params: SteerParams) -> bytes:
    title = f"how well the prompts are told apart: {params.site}"
    if not params.by_head:
        by_layer = sorted(measurement.places, key=lambda place: place.layer)
        layers = [float(place.layer) for place in by_layer]
        series = {}
        for name in ("accuracy", "cosine"):
            values = [getattr(measurement.places[place], name) for place in by_layer]
            if None not in values:
                series[name] = (layers, values)
        return line_chart(series, title=title, x="layer", y="accuracy (left out), cosine")
    heads = _heads(measurement, architecture, params)
    rows = [[float("nan") if one is None else one for one in row] for row in heads.scores]
    kind = "head" if params.site == "head" else "key-value head"
    return heat_map(rows, title=title, x=kind, y="layer", marks=heads.heads, bounds=(0.0, 1.0))


def _number(value: float) -> float:
    return float(f"{value:.9g}")


def _mean(values: list[float]) -> float:
    return _number(sum(values) / len(values))
