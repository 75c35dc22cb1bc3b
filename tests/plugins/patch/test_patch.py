"""`use = "patch"`: what was saved is applied again to the checkpoint it was made for, and refused by any other."""

from dataclasses import replace
from pathlib import Path

import pytest

from regraft.core.checkpoint import FileRef
from regraft.core.errors import Unsupported
from regraft.core.operations import Convert, Operation, Value
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.patch_folder import save_patch
from regraft.core.sources import open_checkpoint
from regraft.core.tensors import MemoryTensor
from regraft.plugins.patch import PatchParams, ReapplyPatch
from tests.checkpoints import bits, write_checkpoint

UP, DOWN, GATE, NEW = "up.weight", "down.weight", "gate.weight", "new.weight"


class Negate(Operation):
    """An operation of a plugin: it has no formula that a saved patch could name."""

    inputs = (GATE,)

    def prepare(self, device):
        return lambda start, stop, rows: -rows


@pytest.fixture
def base(tmp_path):
    import torch

    tensors = {name: torch.randn(4, 3) for name in (UP, DOWN, GATE)}
    return open_checkpoint(write_checkpoint(tmp_path / "base", tensors, config={"model_type": "none"}))


def patch_for(base):
    """A rename, a removal, an added value, an operation without formula, a change of config, a file."""
    import torch

    new = MemoryTensor(NEW, torch.arange(5.0))
    return Patch(
        edits={NEW: Edit(new.spec, Value(new)), GATE: Edit(replace(base.specs[GATE], dtype="F16"), Negate())},
        removals=frozenset({DOWN}),
        renames={"moved.weight": UP},
        json={"config.json": {"rope_theta": 5.0}},
        files={"code/modeling.py": FileRef(data=b"# code\n")},
        notes=("done",),
    )


@pytest.fixture
def saved(base, tmp_path):
    patch = patch_for(base)
    save_patch(patch, base, overlay(base, patch, by="made"), tmp_path / "made.regraft")
    return PatchParams(path=tmp_path / "made.regraft")


def test_the_same_checkpoint_comes_out(base, saved):
    ReapplyPatch().check(base, saved)
    once = overlay(base, patch_for(base), by="once")
    again = overlay(base, ReapplyPatch().patch(base, saved), by="again")
    assert again.specs == once.specs
    assert {name: bits(again.load(name)) for name in again.specs} == {
        name: bits(once.load(name)) for name in once.specs
    }  # fmt: skip
    assert again.config == once.config
    assert again.files["code/modeling.py"].read() == b"# code\n"
    assert list(again.specs) == list(once.specs)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda tensors: tensors.pop(GATE), GATE),
        (lambda tensors: tensors.update({GATE: tensors[GATE][:2]}), GATE),
        (lambda tensors: tensors.update({GATE: tensors[GATE].half()}), GATE),
        (lambda tensors: tensors.pop(DOWN), DOWN),
        (lambda tensors: tensors.pop(UP), UP),
    ],
)
def test_another_checkpoint_is_refused(change, place, base, saved, tmp_path):
    tensors = {name: base.load(name) for name in base.specs}
    change(tensors)
    other = open_checkpoint(write_checkpoint(tmp_path / "other", tensors, config={"model_type": "none"}))
    with pytest.raises(Unsupported, match="made for another checkpoint") as caught:
        ReapplyPatch().check(other, saved)
    assert caught.value.where == f"{saved.path}: {place}"
    assert caught.value.remedy


def test_its_code_is_not_trusted():
    assert ReapplyPatch.own_code is False


def test_a_formula_takes_no_room(base, tmp_path):
    spec = replace(base.specs[UP], dtype="BF16")
    patch = Patch(edits={UP: Edit(spec, Convert(UP))})
    save_patch(patch, base, overlay(base, patch, by="cast"), tmp_path / "cast.regraft")
    assert Path(tmp_path / "cast.regraft/tensors.safetensors").stat().st_size < 100
