"""What a search leaves beside the checkpoint: the table of heads, and where weight lies on sinks before and after."""

from __future__ import annotations

from typing import Any

from regraft.core.checkpoint import FileRef
from regraft.core.head_file import HeadFile
from regraft.core.plots import heat_map
from regraft.plugins.attention_calibration.aim import Aim
from regraft.plugins.attention_calibration.search import Found


def reports(found: Found, aim: Aim) -> dict[str, FileRef]:
    """heads.json, which `heads` reads again, and the maps of sinks; the same bytes for the same results."""
    scores = [[found.gains.get((layer, head)) for head in range(aim.num_heads)] for layer in range(aim.num_layers)]
    table = HeadFile(
        found.heads, scoring=f"gain in {found.score}, alone", num_layers=aim.num_layers, num_heads=aim.num_heads,
        scores=scores,
    )  # fmt: skip
    values = [value for rows in found.maps.values() for row in rows for value in row if value == value]
    files = {"heads.json": FileRef(data=table.as_bytes())}
    for name, rows in found.maps.items():
        picture = heat_map(
            rows, title=f"mean weight on sinks, {name}", x="head", y="layer", marks=found.heads,
            bounds=(0.0, max(values) or 1.0),
        )  # fmt: skip
        files[f"sinks-{name}.png"] = FileRef(data=picture)
    return files


def metrics(found: Found) -> dict[str, Any]:
    """Figures for the lock file; no times."""
    scores = {
        name: {
            "questions": found.questions[name],
            "accuracy": {"before": found.before[name].accuracy, "after": found.after[name].accuracy},
            "log_prob": {"before": found.before[name].log_prob, "after": found.after[name].log_prob},
        }
        for name in found.before
    }
    return {
        "heads": [list(head) for head in found.heads],
        "gains": {f"{layer}.{head}": found.gains[layer, head] for layer, head in found.heads},
        **({"reason": found.reason} if found.reason else {}),
        "helpful_alone": found.helpful,
        "tried": found.tried,
        "without_sinks": found.without_sinks,
        "score": found.score,
        **scores,
    }


def notes(found: Found) -> tuple[str, ...]:
    """What a user should know."""
    if found.reason:
        asked = ", ".join(f"{found.before[name].accuracy:.1%} of {count}" for name, count in found.questions.items())
        right = f"the model answers {asked} questions rightly, searched on and held out"
        return (f"no head is worth calibrating: {found.reason}; the output is the base, unchanged", right)
    moved = ", ".join(
        f"{found.before[name].accuracy:.1%} to {found.after[name].accuracy:.1%} on {found.questions[name]} questions"
        f"{' held out' if name == 'held_out' else ''}"
        for name in found.before
    )
    cut = ""
    if len(found.heads) < found.helpful:
        cut = f"; {found.helpful} gain alone, and were cut back because together they did not help"
    heads = f"{len(found.heads)} of {found.tried} heads with sinks are calibrated{cut}"
    return (heads, f"accuracy went from {moved}")
