"""What a training needs to go on after it was killed: a folder for the saved step, safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regraft.core.errors import InputError, ResourceError, UsageError
from regraft.core.jsonio import dump, read_object, same
from regraft.core.training.tensor_file import read_tensors, write_tensors

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})")
_TENSORS, _FACTS = "state.safetensors", "state.json"
_SHOWN = 8
ANEW = "begin anew with `apply --restart`, which deletes the folder"


@dataclass(frozen=True)
class State:
    """The training after `step` steps.

    Args:
        step: steps done.
        losses: of each of them.
        tokens: seen.
        weights: by name, as the optimiser has them.
        average: likewise, or nothing.
        optimizer: of each of its parameters, by number.
        stopped: why it ended before its last step, if it did.
    """

    step: int
    losses: tuple[float, ...]
    tokens: int
    weights: Mapping[str, torch.Tensor]
    average: Mapping[str, torch.Tensor]
    optimizer: Mapping[int, Mapping[str, Any]]
    stopped: str = ""


class StateFolder:
    """Keeps the latest state of one training.

    Args:
        folder: its own; made if missing.
        identity: everything that decides the result, as JSON values.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))

    def load(self) -> State | None:
        """The latest state; None if there is none. What a killed process left unfinished is removed.

        Raises:
            UsageError: it belongs to another training; says in what they differ.
            InputError: it is damaged.
        """
        if not self.folder.is_dir():
            return None
        for part in self.folder.glob(".step-*.part"):
            shutil.rmtree(part, ignore_errors=True)
        folders = sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        if not folders:
            return None
        try:
            facts = read_object(folders[-1] / _FACTS)
            tensors, metadata = read_tensors(folders[-1] / _TENSORS)
        except InputError:
            raise _damaged(folders[-1]) from None
        self._check(facts.get("identity"))
        try:
            if metadata.get("step") == str(facts["step"]):
                return _state(facts, tensors)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            pass
        raise _damaged(folders[-1])

    def save(self, state: State) -> None:
        """Write `state`, and only then remove the one before.

        Raises:
            ResourceError: the folder cannot be written.
        """
        part, final = self.folder / f".step-{state.step:08d}.part", self.folder / f"step-{state.step:08d}"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            tensors, optimizer = _tensors(state)
            write_tensors(part / _TENSORS, tensors, {"step": str(state.step)})
            facts = {"step": state.step, "tokens": state.tokens, "losses": state.losses, "stopped": state.stopped,
                     "optimizer": optimizer, "identity": self.identity}  # fmt: skip
            (part / _FACTS).write_bytes(dump(facts))
            _flush(part / _FACTS)
            _flush(part)
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
            _flush(self.folder)
            for old in self.folder.iterdir():
                if _NAME.fullmatch(old.name) and old != final:
                    shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise ResourceError(
                "the state of the training cannot be saved", where=self.folder, found=error, remedy="free some space"
            ) from None

    def _check(self, saved: Any) -> None:
        if not isinstance(saved, Mapping):
            raise _damaged(self.folder)
        differing = differences(saved, self.identity)
        if differing:
            shown = "; ".join(differing[:_SHOWN]) + ("; ..." if len(differing) > _SHOWN else "")
            raise UsageError(
                "the saved state belongs to another training",
                where=self.folder,
                expected="the same settings, data, start weights, device and torch threads",
                found=shown,
                remedy=f"restore them, or {ANEW}",
            )


def _damaged(where: Path) -> InputError:
    return InputError("the saved state is damaged", where=where, remedy=ANEW)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Its state by number of the parameter. What bitsandbytes wraps in a dictionary of its own is unwrapped."""
    flat: dict[int, dict[str, Any]] = {}
    for index, values in optimizer.state_dict()["state"].items():
        flat[index] = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
        for wrapped in values.values():
            flat[index].update(wrapped if isinstance(wrapped, Mapping) else {})
    return flat


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Any]]) -> None:
    """Put the state back; rates and other settings are the optimiser's own."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(
        {"state": {index: dict(values) for index, values in state.items()}, "param_groups": groups}
    )


def _tensors(state: State) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """All tensors under one name each, and the numbers of the optimiser, which JSON holds."""
    tensors = {f"weights/{name}": tensor for name, tensor in state.weights.items()}
    tensors |= {f"average/{name}": tensor for name, tensor in state.average.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state.optimizer.items():
        numbers[str(index)] = {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
        tensors |= {
            f"optimizer/{index}/{key}": value for key, value in values.items() if isinstance(value, torch.Tensor)
        }
    return tensors, numbers


def _state(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> State:
    optimizer: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in facts["optimizer"].items()}
    named: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "average": {}}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == "optimizer":
            index, _, key = rest.partition("/")
            optimizer[int(index)][key] = tensor
        else:
            named[kind][rest] = tensor
    return State(
        int(facts["step"]),
        tuple(map(float, facts["losses"])),
        int(facts["tokens"]),
        named["weights"],
        named["average"],
        optimizer,
        str(facts["stopped"]),
    )


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """Where two identities differ, a sentence each."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        keys = [*saved, *(key for key in now if key not in saved)]
        return [
            line
            for key in keys
            for line in differences(saved.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if same(saved, now) else [f"{path} was {json.dumps(saved)} and is {json.dumps(now)}"]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
