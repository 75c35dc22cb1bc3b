"""What of two lock files' environments differs, and what that can change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from regraft.core.provenance import PACKAGES

Severity = Literal["weights", "records", "nothing"]
"""What a difference can change: tensors; only pictures and figures in the files beside them; no byte."""

SEVERITIES: tuple[Severity, ...] = ("weights", "records", "nothing")
_DRAWS = ("matplotlib",)
_MOVES = ("safetensors",)
"""Packages that put tensors into other libraries' hands, and compute nothing."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as recorded."""

    name: str
    recorded: str
    found: str
    severity: Severity

    def __str__(self) -> str:
        """In one line."""
        can = {
            "weights": "can change weights",
            "records": "can change reports, no weight",
            "nothing": "changes no byte",
        }
        return f"{self.name}: recorded {self.recorded}, now {self.found}: {can[self.severity]}"


def differences(record: Mapping[str, Any], made: Mapping[str, Any]) -> list[Difference]:
    """What differs between the environments of two lock files, the gravest first."""
    found = [
        Difference(name, _text(before), _text(after), severity)
        for name, before, after, severity in _pairs(record, made)
        if before != after
    ]
    return sorted(found, key=lambda difference: SEVERITIES.index(difference.severity))


def _pairs(record: Mapping[str, Any], made: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any, Severity]]:
    before, after = record["environment"], made["environment"]
    yield "device", before.get("device"), after.get("device"), "weights"
    yield "machine", before.get("machine"), after.get("machine"), "weights"
    yield "processes", before.get("processes", 1), after.get("processes", 1), "weights"
    yield "torch threads", before.get("torch_threads"), after.get("torch_threads"), "weights"
    yield "regraft", record.get("regraft"), made.get("regraft"), "weights"
    for old, new in zip(record.get("steps", []), made.get("steps", []), strict=False):
        for key in ("version", "plugin", "plugin_version"):
            yield f"step {old.get('id')}: {key}", old.get(key), new.get(key), "weights"
    stated = before.get("packages", {})
    for name in PACKAGES:
        if name in stated:  # an older record may not know it
            kind: Severity = "records" if name in _DRAWS else "nothing" if name in _MOVES else "weights"
            yield name, stated[name], after["packages"].get(name), kind
    old_python, new_python = str(before.get("python")), str(after.get("python"))
    minor = old_python.split(".")[:2] != new_python.split(".")[:2]
    yield "python", old_python, new_python, "weights" if minor else "nothing"
    yield "system", before.get("system"), after.get("system"), "nothing"


def _text(value: Any) -> str:
    return "none" if value is None else str(value)
