"""The MLP of the last layer, computed for the tokens alone whose successors are learnt.

Nothing reads its output elsewhere: the head looks at the states of those tokens only, and attention comes before it.
With answers of a few tokens behind long prompts that saves most of it, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from regraft.core.architectures import Architecture
from regraft.core.data.examples import IGNORED
from regraft.core.training.modules import layer_modules, role_module


def last_mlp(model: Any, architecture: Architecture) -> Any | None:
    """The module of the last layer's MLP, which computes each token by itself; None where there is none such, as with
    experts, or where it is not a module of its own.
    """
    layer = architecture.num_layers - 1
    if "router" in architecture.roles(layer) or not architecture.has("down_proj", layer):
        return None
    path = architecture.slot("down_proj", layer).module
    role_module(model, architecture, "down_proj", layer)
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    return None if parent in (None, layer_modules(model, architecture)[layer]) else parent


@contextmanager
def learnt_tokens_only(module: Any, labels: torch.Tensor) -> Iterator[None]:
    """While this lasts `module` takes [B, T, d] and computes only the tokens before a label; it gives 0 elsewhere.

    Args:
        module: of each token by itself, one tensor to one tensor.
        labels: [B, T], not shifted.
    """
    rows = (labels[:, 1:] != IGNORED).nonzero()
    index = rows[:, 0] * labels.shape[1] + rows[:, 1]

    def before(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        states, *others = args
        return (states.flatten(0, 1).index_select(0, index)[None], *others)

    def after(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        whole = output.new_zeros(labels.numel(), output.shape[-1])
        return whole.index_copy(0, index, output[0]).view(*labels.shape, -1)

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
