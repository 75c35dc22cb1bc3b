"""`regraft verify`: is a checkpoint folder what its lock file says, and does it hold together?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from regraft.cli.console import print_json
from regraft.cli.options import DEPTHS, Json

if TYPE_CHECKING:
    from regraft.core.verify.folder import VerifyReport


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
    from regraft.core.errors import UsageError, VerificationError
    from regraft.core.host import host
    from regraft.core.recipe.wording import either
    from regraft.core.verify.folder import verify_folder

    if depth not in DEPTHS:
        raise UsageError(
            "unknown depth", where="--depth", expected=either(DEPTHS), remedy="name one of these", found=depth
        )
    report = verify_folder(folder, host().architectures(), depth=cast(Any, depth), deep=deep, trust=trust_remote_code)
    if as_json:
        print_json(as_document(report, depth, deep=deep))
    else:
        _print(report)
    if faults := report.faults:
        raise VerificationError(
            f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'}", where=folder, remedy=faults[0].remedy or None
        )


def as_document(report: VerifyReport, depth: str, *, deep: bool) -> dict[str, Any]:
    """The report as a JSON object."""
    return {
        "checkpoint": str(report.folder),
        "depth": depth,
        "deep": deep,
        "ok": not report.faults,
        "digests_that_agree": report.agreeing,
        "findings": [vars(finding) for finding in report.findings],
        "stock": dict(report.stock),
    }


def _print(report: VerifyReport) -> None:
    for finding in report.findings:
        print(f"{'fault' if finding.fatal else 'note'}: {finding}")
    if not report.faults:
        print(f"{report.folder}: {report.tensors} tensors, {report.agreeing} digests agree, no faults")
