"""`patch`: apply again what `regraft apply --save-patches` saved from a step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, PluginError, Unsupported
from regraft.core.hookspecs import hookimpl
from regraft.core.patch import Patch, overlay
from regraft.core.transformation import AnyTransformation, Params, WeightSpace


class PatchParams(Params):
    """Parameters of `patch`."""

    path: Path = Field(description="A `.regraft` folder that `apply --save-patches` wrote.")


class ReapplyPatch(WeightSpace[PatchParams]):
    """Applies a saved patch to a checkpoint with the same tensors as the one it was made for."""

    name = "patch"
    summary = "Apply a saved patch again."
    own_code = False
    Params = PatchParams

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters for a tiny checkpoint: a patch that halves what o_proj of layer 0 writes."""
        import torch

        from regraft.core.architectures import architecture_of
        from regraft.core.operations import ScaleRows
        from regraft.core.patch import Edit
        from regraft.core.patch_folder import save_patch
        from regraft.core.tensors import MemoryTensor

        spec = checkpoint.specs[architecture_of(checkpoint.config, checkpoint.specs).slot("o_proj", 0).tensor]
        halves = MemoryTensor("factors", torch.full((spec.rows,), 0.5))
        saved = Patch(edits={spec.name: Edit(spec, ScaleRows(spec.name, halves))})
        save_patch(saved, checkpoint, overlay(checkpoint, saved, by=cls.name), folder / "example.regraft")
        return {"path": str(folder / "example.regraft")}

    def check(self, checkpoint: Checkpoint, params: PatchParams) -> None:
        """Refuse a checkpoint whose tensors are not those that the patch reads.

        Raises:
            Unsupported: a tensor is missing, or has another dtype or shape.
            InputError: the patch is malformed, or contradicts itself.
        """
        from regraft.core.patch_folder import load_patch

        patch, reads = load_patch(params.path)
        for name, spec in reads.items():
            found = checkpoint.specs.get(name)
            if found != spec:
                raise Unsupported(
                    "the patch was made for another checkpoint",
                    where=f"{params.path}: {name}",
                    expected=spec,
                    found=found or "no such tensor",
                    remedy="apply it to the checkpoint it was saved from",
                )
        for name in [*patch.removals, *patch.renames.values()]:
            if name not in checkpoint.specs:
                raise Unsupported(
                    "the patch was made for another checkpoint",
                    where=f"{params.path}: {name}",
                    found="no such tensor",
                    remedy="apply it to the checkpoint it was saved from",
                )
        try:
            overlay(checkpoint, patch, by=self.name)
        except PluginError as error:
            raise InputError(
                f"the saved patch contradicts itself: {error.message}",
                where=f"{params.path}: {(error.where or '').removeprefix(f'step {self.name}: ')}",
                expected=error.expected,
                found=error.found,
                remedy="save it again",
            ) from None

    def patch(self, checkpoint: Checkpoint, params: PatchParams) -> Patch:
        """The saved patch."""
        from regraft.core.patch_folder import load_patch

        return load_patch(params.path)[0]


@hookimpl
def regraft_transformations() -> list[type[AnyTransformation]]:
    """Our transformation."""
    return [ReapplyPatch]
