"""A generator's folder: `config.json` and safetensors. Reads the published layout too. Opening it imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import InputError
from regraft.core.jsonio import brief, dump
from regraft.core.sources.open import open_checkpoint
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.core.tensors import LazyTensor
from regraft.plugins.vlora.published import PUBLISHED_KEY, published_settings, published_tensors
from regraft.plugins.vlora.settings import FORMAT, GeneratorSettings, faults

if TYPE_CHECKING:
    from regraft.plugins.vlora.generator import PerceptualGenerator

WEIGHTS = "model.safetensors"
_SHOWN = 3


@dataclass(frozen=True)
class GeneratorFolder:
    """An opened generator: its settings, and its tensors under our names, headers validated.

    Args:
        label: as the user wrote it.
        settings: its sizes.
        tensors: by the names of `settings.shapes()`.
        origin: where it comes from: kind of source, and of a hub id the commit.
    """

    label: str
    settings: GeneratorSettings
    tensors: Mapping[str, LazyTensor]
    origin: Mapping[str, Any]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of its weights as stored."""
        return sum(tensor.spec.nbytes for tensor in self.tensors.values())

    def load(self, device: str = "cpu") -> PerceptualGenerator:
        """The generator with its weights in fp32, in eval mode, nothing of it learning.

        Raises:
            InputError: a weight is NaN or infinite, or the file cannot be read.
        """
        import torch

        from regraft.plugins.vlora.generator import empty_generator

        state: dict[str, torch.Tensor] = {}
        for name, tensor in self.tensors.items():
            values = tensor.load(device).float()
            if not torch.isfinite(values.abs().sum(dtype=torch.float64)):
                raise InputError("a weight of the generator is NaN or infinite", where=f"{self.label}: {name}",
                                 remedy="train it again, with a lower learning rate")  # fmt: skip
            state[name] = values
        generator = empty_generator(self.settings)
        generator.load_state_dict(state, assign=True)
        return generator.requires_grad_(False).eval()


def open_generator(reference: str | Path) -> GeneratorFolder:
    """The generator in a folder, or under a hub id; of the weights only headers are read.

    Raises:
        InputError: there is none; its config or headers are not valid, or contradict each other; pickled weights.
    """
    checkpoint = open_checkpoint(reference)
    config = checkpoint.config
    if config.get("format") == FORMAT:
        settings = _settings(checkpoint, config)
        tensors = checkpoint.tensors
    elif PUBLISHED_KEY in config:
        settings = _settings(checkpoint, published_settings(config, f"{checkpoint.label}: {CONFIG}"))
        tensors = published_tensors(checkpoint, settings)
    else:
        raise InputError(
            "is no generator of perceptual weights", where=f"{checkpoint.label}: {CONFIG}",
            expected=f'"format": "{FORMAT}", or the keys of the published checkpoint ({PUBLISHED_KEY}, ...)',
            found=brief(config.get("format", config.get("model_type"))),
            remedy="name the folder that vlora-train wrote",
        )  # fmt: skip
    _check_tensors(checkpoint.label, settings, tensors)
    return GeneratorFolder(checkpoint.label, settings, tensors, checkpoint.origin)


def save_generator(generator: PerceptualGenerator, folder: Path, *, dtype: str = "float32") -> None:
    """Write a generator; the config last, so that a folder without one is an unfinished one.

    Args:
        generator: with values; on any device.
        folder: made if it is not there.
        dtype: `float32`, `bfloat16` or `float16`: of the stored weights.
    """
    import torch

    from regraft.core.training.tensor_file import write_tensors

    state = generator.state_dict()
    write_tensors(folder / WEIGHTS, {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()})
    (folder / CONFIG).write_bytes(config_bytes(generator.settings))


def config_bytes(settings: GeneratorSettings) -> bytes:
    """config.json of a generator's folder."""
    return dump(settings.model_dump(mode="json"))


def _settings(checkpoint: Checkpoint, config: Mapping[str, Any]) -> GeneratorSettings:
    try:
        return GeneratorSettings.model_validate(dict(config))
    except ValidationError as error:
        raise InputError("is no valid configuration of a generator", where=f"{checkpoint.label}: {CONFIG}",
                         found=faults(error), remedy="fetch or train the generator again") from None  # fmt: skip


def _check_tensors(label: str, settings: GeneratorSettings, tensors: Mapping[str, LazyTensor]) -> None:
    shapes = settings.shapes()
    wrong = [f"{name} {list(shape)}, found {_found(tensors.get(name))}" for name, shape in shapes.items()
             if name not in tensors or tensors[name].spec.shape != shape]  # fmt: skip
    wrong += [f"no tensor {name}" for name in tensors if name not in shapes]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError("weights and config of the generator contradict each other", where=label,
                         expected="; ".join(wrong[:_SHOWN]) + more,
                         remedy="fetch or train the generator again")  # fmt: skip
    for tensor in tensors.values():
        if tensor.spec.dtype not in FLOAT_CODES:
            raise InputError("a weight of the generator is no float tensor", where=f"{label}: {tensor.spec.name}",
                             expected=", ".join(sorted(FLOAT_CODES)), found=tensor.spec.dtype,
                             remedy="save it unquantised")  # fmt: skip


def _found(tensor: LazyTensor | None) -> str:
    return "no such tensor" if tensor is None else _shape(tensor.spec)


def _shape(spec: TensorSpec) -> str:
    return f"{list(spec.shape)}"
