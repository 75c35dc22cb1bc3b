"""A PEFT adapter folder: opened like a checkpoint, and its factors held against its config. Reads headers only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from regraft.core.adapter import ADAPTER_WEIGHTS
from regraft.core.buffers import unreadable
from regraft.core.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint
from regraft.core.errors import InputError
from regraft.core.sources.folder import side_files
from regraft.core.tensors import WeightFile
from regraft.core.verify.structure import Finding

_A = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<role>lora_(?:embedding_)?)A(?P<leaf>\.weight)?")
_REMEDY = "write the adapter again, or fetch it again"


def is_adapter(folder: Path) -> bool:
    """Whether `folder` is an adapter's and no checkpoint's."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file()


def open_adapter(folder: Path, *, label: str) -> Checkpoint:
    """The adapter in `folder`, headers validated.

    Raises:
        InputError: it has no weights, a bad header, or cannot be read.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        raise InputError("the adapter folder has no weights", where=label, expected=ADAPTER_WEIGHTS, remedy=_REMEDY)
    try:
        files, left_behind = side_files(folder, {ADAPTER_WEIGHTS})
    except OSError as error:
        raise unreadable(error.filename or folder, error) from None
    return Checkpoint(label, dict(WeightFile(file).tensors()), files, left_behind=left_behind)


def check_adapter(adapter: Checkpoint) -> list[Finding]:
    """Whether A and B belong together, and have the ranks of the config."""
    config = adapter.json(ADAPTER_CONFIG)
    partners: set[str] = set()
    findings = []
    for name, spec in adapter.specs.items():
        match = _A.fullmatch(name)
        if match is None:
            continue
        partner = f"base_model.model.{match['module']}.{match['role']}B{match['leaf'] or ''}"
        partners |= {name, partner}
        other, rank = adapter.specs.get(partner), _rank(config, match["module"])
        if other is None:
            found = "no such tensor"
        elif spec.shape[:1] != (rank,) or other.shape[1:] != (rank,):
            found = f"{list(spec.shape)} and {list(other.shape)}"
        else:
            continue
        findings.append(Finding("factors and config disagree", f"{adapter.label}: {partner}",
                                f"A [{rank}, in] and B [out, {rank}]", found, _REMEDY))  # fmt: skip
    return [*findings, *_strangers(adapter, partners)]


def _rank(config: Mapping[str, Any], module: str) -> Any:
    """The rank of a module, as PEFT reads it."""
    patterns = config.get("rank_pattern") or {}
    return next(
        (rank for pattern, rank in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), config.get("r")
    )


def _strangers(adapter: Checkpoint, known: set[str]) -> Iterator[Finding]:
    for name in adapter.tensors:
        if name not in known:
            yield Finding("a tensor that is no factor", f"{adapter.label}: {name}", fatal=False)
