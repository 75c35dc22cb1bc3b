"""A tiny checkpoint, extended and written, and the models that stock transformers loads from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Patch, overlay
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.context_extension import ContextExtension
from regraft.plugins.context_extension.params import ContextExtensionParams
from tests.families import save_tiny
from tests.materialise import materialise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WINDOW = 16
"""The window of the tiny models here, so that a few dozen positions are several windows."""


@dataclass(frozen=True)
class Extended:
    """What a step made of a checkpoint: the base, the patch, and the folder with the result."""

    base: Path
    folder: Path
    patch: Patch

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "config.json").read_text())


def params(**values: Any) -> ContextExtensionParams:
    return ContextExtensionParams.model_validate({"target_length": 4 * WINDOW, **values}, strict=True)


def save(family: str, folder: Path, **overrides: Any) -> Path:
    """A tiny model with a window of 16 tokens."""
    return save_tiny(family, folder, **{"max_position_embeddings": WINDOW, **overrides})


def apply(checkpoint: Checkpoint, **values: Any) -> Patch:
    """Check, plan and apply, as a recipe does; the plan must say what the patch does."""
    step, given = ContextExtension(), params(**values)
    step.check(checkpoint, given)
    patch = step.apply(checkpoint, given, Run("step"))
    assert step.plan(checkpoint, given).deviations(patch) == []
    return patch


def extend(base: Path, folder: Path, **values: Any) -> Extended:
    """Extend the checkpoint in `base` and write the result to `folder`."""
    checkpoint = open_folder(base, label="base")
    patch = apply(checkpoint, **values)
    return Extended(base, materialise(overlay(checkpoint, patch, by="step"), folder), patch)


def rewrite_config(folder: Path, changes: Mapping[str, Any], *, without: tuple[str, ...] = ()) -> Path:
    """Change keys of config.json, and remove those of `without`."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))
    return folder


def load(folder: Path, *, trust: bool = False, **options: Any) -> PreTrainedModel:
    """The causal language model in `folder`, fp32, for inference."""
    import torch
    from transformers import AutoModelForCausalLM

    options = {"trust_remote_code": True, **options} if trust else options
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval().requires_grad_(False)


def token_ids(length: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random ids [batch, length] that are no special tokens of the tiny models."""
    import torch

    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def scale_outputs(model: PreTrainedModel, name: str, factor: Any, *, layers: range, rows: slice | None = None) -> None:
    """Multiply what the modules `name` of `layers` put out, all features or `rows` of them, by `factor`[position]."""
    import torch

    factors = torch.tensor([factor(position) for position in range(1024)], dtype=torch.float32)

    def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # Projections give [batch, length, features], norms of heads [batch, length, heads, head_dim].
        column = factors[: output.shape[1]].view(1, -1, *[1] * (output.dim() - 2))
        result = output.clone()
        result[..., rows or slice(None)] *= column
        return result

    for layer in layers:
        model.get_decoder().layers[layer].get_submodule(name).register_forward_hook(hook)


def greedy(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> list[list[int]]:
    """24 tokens, one after another, whatever they are."""
    return model.generate(ids, max_new_tokens=24, min_new_tokens=24, do_sample=False, **options).tolist()
