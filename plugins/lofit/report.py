"""What a step leaves beside the checkpoint: heads.json, a map of the heads, the offsets, and the losses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import FileRef
from regraft.core.head_file import HeadFile
from regraft.core.plots import heat_map
from regraft.core.training.report import report_metrics, training_reports
from regraft.plugins.lofit.aim import Aim
from regraft.plugins.lofit.params import LofitParams

if TYPE_CHECKING:
    from regraft.plugins.lofit.fit import Learnt

OFFSETS = "offsets.safetensors"
"""Tensors named as `steer` reads them: `layers.3.heads.0`, `layers.3.kv_groups.0`."""

_KINDS = {"head": "heads", "kv-group": "kv_groups"}


def reports(learnt: Learnt, aim: Aim, params: LofitParams) -> dict[str, FileRef]:
    """Every file of the report, the same bytes for the same results."""
    held_out = {}
    if learnt.held_out:
        held_out = {0: learnt.held_out["before"]["loss"], learnt.report.steps: learnt.held_out["after"]["loss"]}
    files = training_reports(learnt.report, "lofit: offsets", held_out=held_out or None)
    if learnt.selection.report is not None:
        files |= training_reports(learnt.selection.report, "lofit: scales, to choose heads", prefix="select-")
    files |= {
        "heads.json": FileRef(data=_head_file(learnt, aim, params).as_bytes()),
        "heads.png": FileRef(data=_head_map(learnt, aim, params)),
        OFFSETS: FileRef(data=_offsets(learnt, params)),
    }
    return files


def metrics(learnt: Learnt, aim: Aim, params: LofitParams) -> dict[str, Any]:
    """Figures for the lock file; no times."""
    layers = sorted({layer for layer, _ in learnt.selection.heads})
    facts: dict[str, Any] = {
        "heads": len(learnt.selection.heads),
        "of": aim.architecture.num_layers * aim.units,
        "lowest_layer": layers[0],
        "learnt_numbers": len(learnt.selection.heads) * aim.architecture.head_dim,
        "longest_offset": max(float(vector.double().norm()) for vector in learnt.vectors.values()),
        "scoring": params.scoring,
        "tune": report_metrics(learnt.report),
        "data": dict(learnt.data),
        "prefix_cache": dict(learnt.prefix),
    }
    if learnt.selection.report is not None:
        facts["select"] = report_metrics(learnt.selection.report)
    if learnt.held_out:
        facts["held_out"] = {name: dict(figures) for name, figures in learnt.held_out.items()}
    return facts


def vector_name(layer: int, unit: int, params: LofitParams) -> str:
    """The name by which `steer` knows where an offset goes."""
    return f"layers.{layer}.{_KINDS[params.site]}.{unit}"


def _head_file(learnt: Learnt, aim: Aim, params: LofitParams) -> HeadFile:
    layers, scores = aim.architecture.num_layers, learnt.selection.scores
    table = [[scores.get((layer, unit)) for unit in range(aim.units)] for layer in range(layers)]
    return HeadFile(
        tuple(learnt.selection.heads),
        params.site,
        params.scoring,
        layers,
        aim.units,
        table if scores else (),
    )


def _head_map(learnt: Learnt, aim: Aim, params: LofitParams) -> bytes:
    """Scores by layer and head, the chosen ones framed; without scores 1 for those chosen."""
    chosen, scores = set(learnt.selection.heads), learnt.selection.scores
    values = [
        [scores.get((layer, unit), math.nan) if scores else float((layer, unit) in chosen) for unit in range(aim.units)]
        for layer in range(aim.architecture.num_layers)
    ]
    what = {"scale": "norms of scales", "grad": "norms of gradients"}.get(params.scoring, f"scoring {params.scoring}")
    x = "head" if params.site == "head" else "key-value head"
    return heat_map(values, title=f"lofit: {what}, chosen heads framed", x=x, y="layer", marks=sorted(chosen))


def _offsets(learnt: Learnt, params: LofitParams) -> bytes:
    from safetensors.torch import save

    named = {vector_name(layer, unit, params): vector for (layer, unit), vector in sorted(learnt.vectors.items())}
    data: bytes = save(named, {"format": "pt"})
    return data
