"""A tiny model with its offsets hooked in, beside the checkpoint that they were baked into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Patch, overlay
from regraft.core.residual_bias import HeadOffset, HeadScale, Offset, ResidualBias, bake_residual_biases
from regraft.core.sources.folder import open_folder
from regraft.core.tensors import MemoryTensor
from tests.materialise import materialise

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LENGTH = 40
"""Tokens of a test batch: more than the windows of the tiny models with sliding layers."""


def vector(size: int, name: str = "vector", *, seed: int = 0, scale: float = 0.5) -> MemoryTensor:
    import torch

    values = torch.randn(size, generator=torch.Generator().manual_seed(seed + 1)) * scale
    return MemoryTensor(name, values)


def open_base(folder: Path) -> tuple[Checkpoint, Architecture]:
    checkpoint = open_folder(folder, label="base")
    return checkpoint, architecture_of(checkpoint.config, checkpoint.specs)


def load(folder: Path) -> PreTrainedModel:
    """What stock transformers loads, with nothing missing and nothing left over; fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model.eval().requires_grad_(False)


def written(checkpoint: Checkpoint, patch: Patch, folder: Path) -> Path:
    return materialise(overlay(checkpoint, patch, by="step"), folder)


def ids(length: int = LENGTH) -> torch.Tensor:
    import torch

    return torch.randint(3, 128, (2, length), generator=torch.Generator().manual_seed(5))


def logits(model: PreTrainedModel, tokens: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        return model(ids() if tokens is None else tokens, **inputs).logits


def hook(
    model: PreTrainedModel,
    architecture: Architecture,
    offsets: Iterable[Offset],
    scales: Iterable[HeadScale] = (),
) -> PreTrainedModel:
    """Add offsets to activations, by the definitions of the sites and nothing else; scales come before offsets."""
    for scale in scales:
        _before(model, architecture, scale.layer, [scale.head], lambda x, s=scale: x * (1 + s.scale * _f(s.vector)))
    for offset in offsets:
        if isinstance(offset, ResidualBias):
            module = architecture.slot(offset.role, offset.layer).module
            assert module is not None
            model.get_submodule(module).register_forward_hook(
                lambda module, args, out, o=offset: out + o.scale * _f(o.vector)
            )
        else:
            _before(
                model,
                architecture,
                offset.layer,
                _heads_of(offset, architecture),
                lambda x, o=offset: x + o.scale * _f(o.vector),
            )
    return model


def _f(vector: Any) -> torch.Tensor:
    return vector.load().float()


def _heads_of(offset: HeadOffset, architecture: Architecture) -> list[int]:
    if offset.site == "head":
        return [offset.head]
    return [head for head in range(architecture.num_heads) if architecture.kv_head_of(head) == offset.head]


def _before(
    model: PreTrainedModel,
    architecture: Architecture,
    layer: int,
    heads: Sequence[int],
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    module = architecture.slot("o_proj", layer).module
    assert module is not None

    def changed(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        inputs = args[0].clone()
        for head in heads:
            columns = architecture.head_columns(head)
            inputs[..., columns] = change(inputs[..., columns])
        return (inputs, *args[1:])

    model.get_submodule(module).register_forward_pre_hook(changed)


def attention_offsets(architecture: Architecture) -> list[Offset]:
    """A vector for a whole layer's output, and two heads of the other layer, one of them the last."""
    size, last = architecture.head_dim, architecture.num_heads - 1
    return [
        ResidualBias(0, "attn_out", vector(architecture.hidden_size)),
        HeadOffset(1, 0, vector(size, seed=1)),
        HeadOffset(1, last, vector(size, seed=2), scale=-1.5),
    ]


def mlp_offsets(architecture: Architecture) -> list[Offset]:
    """One vector for each of the two layers."""
    return [ResidualBias(layer, "mlp_out", vector(architecture.hidden_size, seed=layer)) for layer in (0, 1)]


def value_offsets(architecture: Architecture) -> list[Offset]:
    """The first key-value group of one layer, the last of the other."""
    last = architecture.num_kv_heads - 1
    return [
        HeadOffset(0, 0, vector(architecture.head_dim, seed=1), site="kv-group"),
        HeadOffset(1, last, vector(architecture.head_dim, seed=3), site="kv-group", scale=1.5),
    ]


@dataclass(frozen=True)
class Baked:
    """What was baked, and the largest differences of logits."""

    base: Path
    folder: Path
    patch: Patch
    error: float
    effect: float

    def check(self, *, effect: float = 0.5) -> None:
        """The baked model computes what the hooked one does, and the hooks did something."""
        assert self.effect >= effect
        assert self.error <= 1e-5


def baked(base: Path, folder: Path, offsets: Callable[[Architecture], list[Offset]], **options: Any) -> Baked:
    """Bake, write, reload, and compare with the base under hooks."""
    checkpoint, architecture = open_base(base)
    wanted = offsets(architecture)
    patch = bake_residual_biases(checkpoint, architecture, wanted, **options)
    model = load(base)
    plain = logits(model)
    hooked = logits(hook(model, architecture, wanted, options.get("scales", ())))
    after = logits(load(written(checkpoint, patch, folder)))
    return Baked(base, folder, patch, (after - hooked).abs().max().item(), (hooked - plain).abs().max().item())
