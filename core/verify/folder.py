"""Everything that `regraft verify DIR` looks at, in one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regraft.core.errors import InputError, UsageError, VerificationError
from regraft.core.sources.folder import open_folder
from regraft.core.sources.open import dequantised
from regraft.core.verify.adapter import check_adapter, is_adapter, open_adapter
from regraft.core.verify.load import Depth, verify_load
from regraft.core.verify.lock import check_lock, scan_values
from regraft.core.verify.structure import Finding, check_structure

_REMEDY = "take the weights from before they were spoilt"


@dataclass(frozen=True)
class VerifyReport:
    """What was found in a checkpoint folder.

    Args:
        folder: the folder.
        tensors: how many it has.
        agreeing: digests of the lock file that agree.
        findings: faults and notes.
        stock: what stock transformers reported; empty if it was not asked.
    """

    folder: Path
    tensors: int
    agreeing: int
    findings: tuple[Finding, ...]
    stock: Mapping[str, Any] = field(default_factory=dict)

    @property
    def faults(self) -> list[Finding]:
        """The findings that make the checkpoint unusable, or other than its lock file says."""
        return [finding for finding in self.findings if finding.fatal]


def verify_folder(
    folder: Path, families: Sequence[Any] = (), *, depth: Depth = "structure", deep: bool = False, trust: bool = False
) -> VerifyReport:
    """Verify the checkpoint, or the adapter, in `folder`.

    Args:
        folder: a checkpoint folder; a lock file in it is recomputed.
        families: rows of plugins for `architecture_of`.
        depth: `structure` reads headers; `load` and `forward` ask stock transformers in a process of its own.
        deep: scan every value for NaN and Inf.
        trust: whether code inside the folder may run in that process.

    Raises:
        InputError: there is no such folder, or it cannot be read as a checkpoint at all.
        UsageError: stock transformers is to load an adapter.
    """
    if not folder.is_dir():
        raise InputError(
            "there is no such folder", where=folder, expected="a checkpoint folder", remedy="check the path"
        )
    if is_adapter(folder):
        if depth != "structure":
            raise UsageError("an adapter is verified by its structure alone", where="--depth", found=depth,
                             remedy="load it with peft, which regraft does not need")  # fmt: skip
        checkpoint = open_adapter(folder, label=str(folder))
        findings = check_adapter(checkpoint)
    else:
        checkpoint = open_folder(folder, label=str(folder))
        findings = check_structure(dequantised(checkpoint), families)
    from_lock, agreeing = check_lock(folder, checkpoint)
    findings += from_lock
    if deep:
        findings += [
            Finding("the tensor is not finite", f"{folder}: {name}", "finite numbers", str(count), _REMEDY)
            for name, count in scan_values(checkpoint).items()
        ]
    stock: Mapping[str, Any] = {}
    if depth != "structure":
        try:
            stock = verify_load(folder, depth, trust=trust)
        except VerificationError as error:
            findings.append(Finding.of(error))
    return VerifyReport(folder, len(checkpoint.tensors), agreeing, tuple(findings), stock)
