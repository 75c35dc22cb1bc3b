"""`--save-patches`: each step's patch in a folder `ID.regraft`, which the transformation `patch` applies again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import UsageError
from regraft.core.patch import Patch
from regraft.core.plan import Plan, PlannedStep


def check_patch_folders(plan: Plan, folder: Path, taken: Iterable[Path]) -> None:
    """Refuse, before anything runs, a folder to which the patches cannot be saved.

    Args:
        plan: whose steps are saved.
        folder: where to.
        taken: the target and the inputs, in which nothing else may be put.

    Raises:
        UsageError: it holds a patch of the same name, or stands in a place that is taken, or is no folder.
    """
    where, resolved = f"--save-patches {folder}", folder.resolve()
    for place in taken:
        if resolved.is_relative_to(place.resolve()):
            raise UsageError(
                "the folder for patches stands inside the target or an input",
                where=where,
                found=place,
                remedy="choose a folder outside it",
            )
    if folder.exists() and not folder.is_dir():
        raise UsageError("is a file", where=where, expected="a folder, new or not", remedy="choose another")
    for step in plan.steps:
        if (place := _patch_folder(folder, step)).exists():
            raise UsageError(
                "the folder for the patch exists already", where=place, remedy="remove it, or choose another"
            )


def save_patches(
    plan: Plan, patches: Sequence[Patch], checkpoints: Sequence[Checkpoint], folder: Path, tell: Callable[[str], None]
) -> None:
    """Save each step's patch into `folder`; all of them or, if one cannot be saved, none.

    Args:
        plan: whose steps they are.
        patches: each step's.
        checkpoints: what each step saw, and last what all of them made.
        folder: is made.
        tell: hears of patches that, applied again, may not give the same codes.

    Raises:
        UsageError, ResourceError, PluginError: as `save_patch`.
    """
    from regraft.core.patch_folder import save_patch

    saved: list[Path] = []
    try:
        for step, patch, (below, above) in zip(plan.steps, patches, pairwise(checkpoints), strict=True):
            save_patch(patch, below, above, place := _patch_folder(folder, step))
            saved.append(place)
            if below.packed is not None and any(not edit.operation.kind for edit in patch.edits.values()):
                tell(f"warning: {step.id}: the base is quantised, and the saved patch holds rounded values: applied "
                     "again it may give other codes than this run")  # fmt: skip
    except BaseException:
        for place in saved:
            shutil.rmtree(place, ignore_errors=True)
        raise


def _patch_folder(folder: Path, step: PlannedStep) -> Path:
    return folder / f"{step.id}.regraft"
