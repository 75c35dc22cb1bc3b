"""`regraft verify`: is a checkpoint folder what its lock file says, and does it hold together?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regraft.cli.console import print_json
from regraft.cli.options import Json


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.")],
    deep: Annotated[bool, typer.Option("--deep", help="Scan every value for NaN and Inf.")] = False,
    depth: Annotated[str, typer.Option(help="structure, load or forward, in stock transformers.")] = "structure",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the folder's own code run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Verify a checkpoint: headers, config against tensors, tokenizer, digests of the lock file."""
    from regraft.core.errors import InputError, UsageError, VerificationError
    from regraft.core.host import host
    from regraft.core.sources.folder import open_folder
    from regraft.core.sources.open import dequantised
    from regraft.core.verify import Finding, check_structure
    from regraft.core.verify.lock import check_lock, scan_values

    if depth not in ("structure", "load", "forward"):
        raise UsageError("unknown depth", where="--depth", expected="structure, load or forward", found=depth)
    if not folder.is_dir():
        raise InputError("there is no such folder", where=folder, expected="a checkpoint folder")
    checkpoint = open_folder(folder, label=str(folder))
    findings = check_structure(dequantised(checkpoint), host().architectures())
    from_lock, agreed = check_lock(folder, checkpoint)
    findings += from_lock
    if deep:
        bad = scan_values(checkpoint)
        findings += [
            Finding("the tensor is not finite", f"{folder}: {name}", found=str(count)) for name, count in bad.items()
        ]
    report: dict[str, Any] = {"checkpoint": str(folder), "depth": depth, "deep": deep, "digests_that_agree": agreed}
    if depth != "structure":
        from regraft.core.verify.load import verify_load

        report["stock"] = verify_load(folder, depth, trust=trust_remote_code)  # type: ignore[arg-type]
    fatal = [finding for finding in findings if finding.fatal]
    if as_json:
        print_json({**report, "ok": not fatal, "findings": [vars(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{'fault' if finding.fatal else 'note'}: {finding}")
    if fatal:
        raise VerificationError(
            f"{len(fatal)} faults", where=folder, remedy="write the checkpoint again, or fetch it again"
        )
    if not as_json:
        print(f"{folder}: {len(checkpoint.tensors)} tensors, {agreed} digests agree, no faults")
