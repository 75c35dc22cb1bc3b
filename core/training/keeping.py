"""Saving and bringing back a training that is spread over processes: the first one holds all of it, and the file.

Weights and averages are saved whole, whoever has which rows. Moments are saved as each process has them, because those
of 8-bit optimisers cannot be joined: those of rank r stand under r·n + i, n parameters, i the parameter's number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regraft.core.errors import InputError
from regraft.core.training.distributed import Group
from regraft.core.training.state import ANEW, State, StateFolder, load_optimizer, optimizer_state
from regraft.core.training.weights import Average, Weights

Moments = dict[int, dict[str, Any]]


class Keeper:
    """The state of one training, in a folder.

    Args:
        folder: of the first process; the others' is not looked at.
        group: all processes.
        weights, optimizer, average: what changes.
    """

    def __init__(
        self,
        folder: StateFolder,
        group: Group,
        weights: Weights,
        optimizer: torch.optim.Optimizer,
        average: Average | None,
    ) -> None:
        self.folder, self.group, self.weights = folder, group, weights
        self.optimizer, self.average = optimizer, average

    def save(self, step: int, losses: Sequence[float], tokens: int, stopped: str) -> None:
        """Keep the training as it stands after `step`.

        Raises:
            ResourceError: it cannot be written.
        """
        weights = self._joined(self.weights.leaves)
        average = {} if self.average is None else self._joined(self.average.values)
        optimizer = self._all_moments()
        if self.group.rank == 0:
            self.folder.save(State(step, tuple(losses), tokens, weights, average, optimizer, stopped))

    def bring_back(self) -> State | None:
        """Put the latest state into weights, optimiser and average; gives it without what these hold.

        Raises:
            UsageError: it belongs to another training.
            InputError: it is damaged.
        """
        state = self.folder.load() if self.group.rank == 0 else None
        facts = (state.step, state.losses, state.tokens, state.stopped) if state else None
        facts = self.group.share(facts)
        if facts is None:
            return None
        try:
            self.weights.load(self._own(state.weights if state else None, self.weights.leaves))
            load_optimizer(self.optimizer, self._own_moments(state))
            if self.average is not None:
                self.average.load(self._own(state.average if state else None, self.average.values))
        except (KeyError, RuntimeError, ValueError, IndexError) as error:
            raise InputError("the saved state is damaged", where=self.folder.folder, found=error, remedy=ANEW) from None
        step, losses, tokens, stopped = facts
        return State(step, losses, tokens, {}, {}, {}, stopped)

    def _joined(self, leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors; in the first process alone those that are shared out."""
        if self.group.world == 1:
            return dict(leaves)
        parts = self.group.collect({name: leaves[name] for name in self.weights.shards})
        joined = {name: torch.cat([part[name] for part in parts]) for name in self.weights.shards if parts}
        return {name: joined.get(name, leaf) for name, leaf in leaves.items()}

    def _own(
        self, whole: Mapping[str, torch.Tensor] | None, leaves: Mapping[str, torch.Tensor]
    ) -> Mapping[str, torch.Tensor]:
        """The part of whole tensors that `leaves` of this process are."""
        if self.group.world == 1:
            assert whole is not None
            return whole
        rows = self.group.gather({name: len(leaves[name]) for name in self.weights.shards})
        parts: list[dict[str, torch.Tensor]] = []
        if whole is not None:
            parts = [{name: tensor for name, tensor in whole.items() if name not in rows[0]} for _ in rows]
            for name in rows[0]:
                pieces = torch.split(whole[name], [one[name] for one in rows])
                for part, piece in zip(parts, pieces, strict=True):
                    part[name] = piece
        return self.group.hand_out(parts)

    def _all_moments(self) -> Moments:
        """Of every process, in the first one; where nothing is shared out, they are the same everywhere."""
        moments = optimizer_state(self.optimizer)
        if not self.weights.shards:
            return moments
        count = len(self.weights.leaves)
        plain = self.group.gather(_without_tensors(moments))
        collected = self.group.collect(_flat(moments))
        everybody: Moments = {}
        for rank, (numbers, tensors) in enumerate(zip(plain, collected, strict=False)):
            for index, values in numbers.items():
                everybody[rank * count + index] = dict(values)
            for name, tensor in tensors.items():
                number, _, key = name.partition("/")
                everybody[rank * count + int(number)][key] = tensor
        return everybody

    def _own_moments(self, state: State | None) -> Mapping[int, Mapping[str, Any]]:
        if self.group.world == 1:
            assert state is not None
            return state.optimizer
        count, several = len(self.weights.leaves), bool(self.weights.shards)
        everybody: list[Moments] = [{} for _ in range(self.group.world)]
        for number, values in (state.optimizer if state else {}).items():
            for moments in [everybody[number // count]] if several else everybody:
                moments[number % count] = dict(values)
        own: Moments = self.group.share([_without_tensors(moments) for moments in everybody])[self.group.rank]
        for name, tensor in self.group.hand_out([_flat(moments) for moments in everybody]).items():
            index, _, key = name.partition("/")
            own[int(index)][key] = tensor
        return own


def _without_tensors(moments: Moments) -> Moments:
    return {
        index: {key: value for key, value in values.items() if not isinstance(value, torch.Tensor)}
        for index, values in moments.items()
    }


def _flat(moments: Moments) -> dict[str, torch.Tensor]:
    """The tensors, by number of the parameter and key."""
    return {
        f"{index}/{key}": value
        for index, values in moments.items()
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }
