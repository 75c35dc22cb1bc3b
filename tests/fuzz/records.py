"""Targets: what regraft wrote and a stranger may have changed: saved patches, lock files, states of trainings."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from pathlib import Path

from tests.fuzz import mutations
from tests.fuzz.contract import REFUSALS, target
from tests.fuzz.honest import base, document, put, scratch


def patches() -> list[bytes]:
    return [(saved_patch() / "patch.json").read_bytes()]


@cache
def saved_patch() -> Path:
    import torch

    from regraft.core.operations import ScaleRows, Value
    from regraft.core.patch import Edit, Patch, overlay
    from regraft.core.patch_folder import save_patch
    from regraft.core.sources import open_checkpoint
    from regraft.core.tensors import MemoryTensor

    below = open_checkpoint(base())
    name, spec = next(item for item in below.specs.items() if len(item[1].shape) == 2)
    norm, flat = next(item for item in below.specs.items() if len(item[1].shape) == 1)
    edits = {
        name: Edit(spec, ScaleRows(name, MemoryTensor("factors", torch.ones(spec.rows)))),
        norm: Edit(flat, Value(MemoryTensor("value", torch.ones(flat.shape)))),
    }
    patch = Patch(edits=edits, json={"config.json": {"a": 1}}, metrics={"m": 1.5}, notes=("n",))
    save_patch(patch, below, overlay(below, patch, by="seed"), scratch() / "seed.regraft")
    return scratch() / "seed.regraft"


@target(mutations.mutated_json, patches)
def patch(data: bytes) -> object:
    """patch.json of a saved patch, and its plan on the checkpoint it was made for."""
    import shutil

    from regraft.core.patch import overlay
    from regraft.core.sources import open_checkpoint
    from regraft.plugins.patch import PatchParams, ReapplyPatch

    folder = scratch() / "fuzzed.regraft"
    if not folder.exists():
        shutil.copytree(saved_patch(), folder)
    put(folder / "patch.json", data)
    checkpoint, params = open_checkpoint(base()), PatchParams(path=folder)
    ReapplyPatch().check(checkpoint, params)
    ReapplyPatch().plan(checkpoint, params)
    return overlay(checkpoint, ReapplyPatch().patch(checkpoint, params), by="patch").config


@cache
def written() -> Path:
    """An output with its lock file."""
    from tests.running import done, write_recipe

    file = write_recipe(scratch() / "written.toml", str(base()), {"use": "context-extension", "method": "abf",
                                                                 "target_length": 4096})  # fmt: skip
    done("apply", file, "-o", scratch() / "written", "--no-durable")
    return scratch() / "written"


def lock_files() -> list[bytes]:
    return [(written() / "regraft.lock.json").read_bytes()]


@target(mutations.mutated_json, lock_files)
def lock(data: bytes) -> object:
    """regraft.lock.json, read as it is before it is run again, and verified."""
    from regraft.core.host import host
    from regraft.core.recorded_inputs import Whereabouts
    from regraft.core.reproduce import read_lock, recorded
    from regraft.core.verify.folder import verify_folder

    path = put(written() / "regraft.lock.json", data)
    with suppress(*REFUSALS):
        _, record = read_lock(path)
        recorded(record, path, host(), Whereabouts(folder=scratch()))
    return verify_folder(written())


def states() -> list[bytes]:
    return [document({"step": 2, "tokens": 10, "losses": [1.0, 0.5], "stopped": "", "optimizer": {"0": {"step": 2.0}},
                      "identity": {"format": 1, "lr": 0.1}})]  # fmt: skip


@target(mutations.mutated_json, states)
def training_state(data: bytes) -> object:
    """state.json of a training that was broken off."""
    import torch

    from regraft.core.training.state import State, StateFolder

    folder = StateFolder(scratch() / "state", {"lr": 0.1})
    if not (scratch() / "state").exists():
        folder.save(State(2, (1.0, 0.5), 10, {"w": torch.zeros(2)}, {}, {0: {"m": torch.zeros(2), "step": 2.0}}))
    put(scratch() / "state/step-00000002/state.json", data)
    return folder.load()
