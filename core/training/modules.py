"""Where the parts of a checkpoint are in the module tree that transformers built from it."""

from __future__ import annotations

from typing import Any

from regraft.core.architectures import Architecture
from regraft.core.errors import Unsupported


def role_module(model: Any, architecture: Architecture, role: str, layer: int) -> Any:
    """The module of `model` that holds `role` of `layer`.

    Raises:
        Unsupported: there is none of its own, or the model's class is built otherwise than the stock one.
    """
    path = _path(architecture, role, layer)
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise Unsupported(
            f"the model's class has no such module, so {role} cannot be found",
            where=path,
            found=type(model).__name__,
            remedy="use a model of a stock class",
        ) from None


def layer_modules(model: Any, architecture: Architecture) -> list[Any]:
    """The decoder layers of `model`, in order.

    Raises:
        Unsupported: they are not to be had as one list.
    """
    number = architecture.num_layers - 1
    path = _path(architecture, "o_proj", number)
    parent, found, _ = path.partition(f".{number}.")
    role_module(model, architecture, "o_proj", number)
    layers = list(model.get_submodule(parent).children()) if found else []
    if len(layers) != architecture.num_layers:
        raise Unsupported(
            "the layers of the model are no list",
            where=path,
            expected=f"{architecture.num_layers} layers",
            found=len(layers),
            remedy="use a model of a stock class",
        )
    return layers


def _path(architecture: Architecture, role: str, layer: int) -> str:
    path = architecture.slot(role, layer).module
    if path is None:
        raise Unsupported(
            f"{role} is part of a stack of experts and has no module of its own",
            where=f"{architecture.model_type}, layer {layer}",
            remedy="use another layer",
        )
    return path
