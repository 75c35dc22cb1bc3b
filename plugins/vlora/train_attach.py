"""Deltas on a running model: every row of a batch has the factors of its own picture, and the weights stay as they are.

    q, k, v, o    y = W x + s · B (Aᵀ x)            x, y: of the projection
    m             y = mlp(x) + s · B (Aᵀ x)         beside the whole MLP

A [d_in, r] comes from the picture, B [d_out, r] is learnt, s the scale. A row of text alone has A = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from regraft.core.architectures import Architecture
from regraft.core.errors import Unsupported
from regraft.core.training.modules import role_module

Key = tuple[str, int]
"""Type, such as `q`, and layer."""
Factors = Mapping[Key, tuple[torch.Tensor, torch.Tensor]]
"""A [M, d_in, r] of M pictures, and B [d_out, r], by type and layer."""

ROLES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
PARALLEL = "m"


class Attached:
    """The places of a model where deltas are added, while `attached`.

    Args:
        model: of transformers.
        architecture: its roles.
        keys: types and layers.
        scale: s.

    Raises:
        Unsupported: the model has no module of its own for one of them.
    """

    def __init__(self, model: Any, architecture: Architecture, keys: Iterable[Key], scale: float) -> None:
        self.scale = scale
        self.places = {key: _place(model, architecture, *key) for key in keys}
        self._seen: dict[Key, tuple[torch.Tensor, torch.Tensor]] | None = None

    def see(self, factors: Factors, rows: torch.Tensor) -> None:
        """What the next passes of the model, backward passes included, see.

        Args:
            factors: of M pictures.
            rows: [B] each row's picture, 0 to M - 1; -1 for none.
        """
        chosen, shows = rows.clamp(min=0), (rows >= 0)[:, None, None]
        self._seen = {key: (A[chosen] * shows, B) for key, (A, B) in factors.items()}

    def look_away(self) -> None:
        """From now on the model is the base."""
        self._seen = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """While this lasts the model adds the deltas of what it sees."""
        with ExitStack() as stack:
            stack.callback(self.look_away)
            for key, (module, rows) in self.places.items():
                stack.callback(module.register_forward_hook(self._hook(key, rows), with_kwargs=True).remove)
            yield

    def _hook(self, key: Key, rows: torch.Tensor | None) -> Callable[..., torch.Tensor | None]:
        def added(module: Any, inputs: Any, named: Mapping[str, Any], output: torch.Tensor) -> torch.Tensor | None:
            del module
            if self._seen is None:
                return None
            A, B = self._seen[key]
            x: torch.Tensor = inputs[0] if inputs else next(iter(named.values()))
            change = (x @ A.to(x.dtype)) @ (self.scale * B.T).to(x.dtype)
            if rows is None:
                return output + change.to(output.dtype)
            return output.index_add(-1, rows, change.to(output.dtype))

        return added


def _place(model: Any, architecture: Architecture, kind: str, layer: int) -> tuple[Any, torch.Tensor | None]:
    """The module that a type of a layer is beside, and which of its outputs it changes; None for all."""
    device = next(model.parameters()).device
    if kind == PARALLEL:
        path = architecture.slot("down_proj", layer).module
        module = None if path is None else _parent(model, path)
        if module is None:
            raise Unsupported(
                "the MLP of this layer is no module of its own",
                where=f"type m, layer {layer}",
                found=type(model).__name__,
                remedy="leave m out of `types`",
            )
        return module, None
    slot = architecture.slot(ROLES[kind], layer)
    module = role_module(model, architecture, ROLES[kind], layer)
    return module, None if slot.whole else torch.tensor(slot.row_indices(), device=device)


def _parent(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return None
