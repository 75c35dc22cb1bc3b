"""Whether what was written is what was planned, looked at before it appears under its name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, VerificationError
from regraft.core.host import Host
from regraft.core.patch import Patch
from regraft.core.plan import Plan, PlannedStep
from regraft.core.sources.folder import CARD, open_folder
from regraft.core.sources.open import dequantised
from regraft.core.verify import check_structure, raise_findings, same_vocabulary
from regraft.core.verify.adapter import check_adapter, open_adapter

_OUTPUT = "the output"
"""How messages name the checkpoint that is not yet in its place."""
_REMEDY = "something else has changed the work folder, or the disk is failing: try again"


def verify_output(
    plan: Plan, patches: Sequence[Patch], result: Checkpoint, output: Path, depth: str | None, host: Host
) -> str:
    """Verify the written folder as deep as asked; returns the depth.

    Args:
        plan: what was planned.
        patches: what the steps returned.
        result: what was written.
        output: where to.
        depth: None takes the recipe's.
        host: the plugins.

    Raises:
        VerificationError: it is not what it should be.
    """
    try:
        open_written = open_adapter if plan.recipe.writes_adapter else open_folder
        written = open_written(output, label=_OUTPUT)
    except InputError as error:
        where = (error.where or "").replace(str(output), _OUTPUT, 1)
        raise VerificationError(
            f"cannot be read back: {error.message}", where=where, expected=error.expected, found=error.found,
            remedy=_REMEDY,
        ) from None  # fmt: skip
    if dict(written.specs) != dict(result.specs):
        names = [*result.specs, *written.specs]
        name = next(name for name in names if written.specs.get(name) != result.specs.get(name))
        raise VerificationError(
            "the written tensors are not those of the plan", where=f"{_OUTPUT}: {name}",
            expected=result.specs.get(name, "no such tensor"), found=written.specs.get(name, "no such tensor"),
            remedy=_REMEDY,
        )  # fmt: skip
    stray = set(written.files) - set(result.files) - {CARD}
    if stray:
        raise VerificationError(
            "it has files that nothing wrote", where=_OUTPUT, found=", ".join(sorted(stray)), remedy=_REMEDY
        )
    if plan.recipe.writes_adapter:
        raise_findings(check_adapter(written), VerificationError)
        return "structure"
    vocabulary = not same_vocabulary(plan.base, result)
    findings = check_structure(dequantised(written), host.architectures(), vocabulary=vocabulary)
    raise_findings(findings, VerificationError)
    depth = depth or plan.recipe.output.verify
    if depth in ("load", "forward"):
        from regraft.core.verify.load import verify_load

        trust = plan.recipe.base.trust_remote_code or all_code_is_ours(plan.steps, patches, result)
        verify_load(output, depth, trust=trust, label=_OUTPUT)  # type: ignore[arg-type]
    return depth


def all_code_is_ours(steps: Sequence[PlannedStep], patches: Sequence[Patch], result: Checkpoint) -> bool:
    """Whether every Python file of `result` comes from the templates of an installed plugin, and there is one.

    A saved patch may be anybody's, and so may the base.
    """
    done = zip(steps, patches, strict=False)
    ours = {name: file for step, patch in done if step.transformation.own_code for name, file in patch.files.items()}
    code = {name: file for name, file in result.files.items() if name.endswith(".py")}
    return bool(code) and all(ours.get(name) == file for name, file in code.items())
