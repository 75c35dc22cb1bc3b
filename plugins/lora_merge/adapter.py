"""A PEFT adapter folder: its settings, and its tensors sorted by the module that they belong to. Reads headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from regraft.core.errors import InputError, Unsupported
from regraft.core.specs import FLOAT_CODES, TensorSpec
from regraft.core.tensors import FileTensor, LazyTensor, WeightFile
from regraft.plugins.lora_merge.config import LoraSettings, read_settings

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
BASE_LAYER = ".base_layer"

LORA_BIAS = ("lora_B", "bias")
_LINEAR = ("lora_A", "lora_B")
_BARE = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_LORA = re.compile(r"(?P<path>.+?)\.(?P<role>lora_[A-Za-z_]+)(?:\.(?P<rest>.+))?")


@dataclass
class Module:
    """The adapter's tensors for one module.

    Args:
        path: of the module in the stock class, such as `model.layers.0.self_attn.q_proj`.
        depth: how many `base_layer` stood before the factors: peft wraps a module once for each parameter it adapts.
        tensors: by role: `lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, `lora_embedding_B`,
            `lora_magnitude_vector`.
    """

    path: str
    depth: int = 0
    tensors: dict[str, LazyTensor] = field(default_factory=dict)

    def specs(self) -> list[TensorSpec]:
        """Specs of its tensors."""
        return [tensor.spec for tensor in self.tensors.values()]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter.

    Args:
        file: its weights, for messages.
        settings: its config.
        modules: low-rank factors, module by module.
        parameters: parameters of the base model that it brings whole, by name, such as `model.norm.weight`:
            `modules_to_save`, trained biases, resized embeddings, and copies.
        copies: those of them that are copies of a frozen weight which it adapts: peft saves one of every adapted
            embedding, because that may have been resized.
    """

    file: Path
    settings: LoraSettings
    modules: tuple[Module, ...]
    parameters: Mapping[str, FileTensor]
    copies: frozenset[str] = frozenset()

    @property
    def num_tensors(self) -> int:
        """Tensors of the file."""
        return sum(len(module.tensors) for module in self.modules) + len(self.parameters)


def open_adapter(folder: Path) -> Adapter:
    """Open the adapter in `folder`.

    Raises:
        InputError: there is no adapter, or it is not valid.
        Unsupported: it is no LoRA, or uses what regraft does not merge.
    """
    if not folder.is_dir():
        raise InputError("there is no such adapter folder", where=folder, expected=f"a folder with {WEIGHTS_FILE}",
                         remedy="download the adapter first if this is a hub id, or check the path")  # fmt: skip
    settings = read_settings(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise _no_weights(folder)
    return _sorted(file, settings, WeightFile(file).tensors())


def _no_weights(folder: Path) -> InputError:
    if (folder / PICKLE_FILE).is_file():
        return InputError("is a pickle, and regraft never reads pickles: they can run code", where=folder / PICKLE_FILE,
                          expected=WEIGHTS_FILE, remedy="load it in peft and save it again as safetensors")  # fmt: skip
    return InputError("the adapter folder has no weights", where=folder, expected=WEIGHTS_FILE,
                      remedy="name the folder that peft's save_pretrained wrote")  # fmt: skip


def _sorted(file: Path, settings: LoraSettings, tensors: Mapping[str, FileTensor]) -> Adapter:
    if not tensors:
        raise InputError("the adapter has no tensors", where=file, remedy="fetch or train it again")
    modules: dict[tuple[str, int], Module] = {}
    parameters: dict[str, FileTensor] = {}
    copies: set[str] = set()
    adapter_names: set[str] = set()
    for full_name, tensor in tensors.items():
        where = f"{file}: {full_name}"
        name = full_name.removeprefix(PREFIX)
        _check_tensor(name, tensor, where)
        match = _LORA.fullmatch(name)
        if match is None:
            parameters[name.replace(BASE_LAYER, "")] = tensor
            if name.endswith(f"{BASE_LAYER}.weight"):
                copies.add(name.replace(BASE_LAYER, ""))
            continue
        path, role, adapter_name = _lora_role(match, where)
        adapter_names.add(adapter_name)
        key = (path.replace(BASE_LAYER, ""), path.count(BASE_LAYER))
        modules.setdefault(key, Module(*key)).tensors[role] = tensor
    if len(adapter_names) > 1:
        raise Unsupported("the file holds several adapters", where=file, expected="one",
                          found=", ".join(sorted(name or "one without a name" for name in adapter_names)),
                          remedy="save each into a folder of its own, and merge one after another")  # fmt: skip
    return Adapter(file, settings, tuple(modules.values()), parameters, frozenset(copies))


def _check_tensor(name: str, tensor: FileTensor, where: str) -> None:
    if tensor.spec.dtype not in FLOAT_CODES:
        raise InputError("is no floating-point tensor", where=where, expected=", ".join(sorted(FLOAT_CODES)),
                         found=tensor.spec.dtype, remedy="save the adapter unquantised")  # fmt: skip
    if name.endswith("trainable_tokens_delta"):
        raise Unsupported("the adapter replaces single rows of the embedding (trainable_token_indices)", where=where,
                          remedy="merge it with peft, and give regraft the result")  # fmt: skip


def _lora_role(match: re.Match[str], where: str) -> tuple[str, str, str]:
    """Module path, role and adapter name of a LoRA tensor: `<path>.<role>[.<adapter>][.weight|.bias]`."""
    path, role = match["path"], match["role"]
    rest = match["rest"].split(".") if match["rest"] else []
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else ""
    known = (role in _BARE and leaf != "bias") or (role in _LINEAR and leaf == "weight") or (role, leaf) == LORA_BIAS
    if known and len(rest) <= 1:
        return path, ".".join(LORA_BIAS) if leaf == "bias" else role, "".join(rest)
    raise Unsupported("the adapter has a tensor of a LoRA variant that regraft does not merge", where=where,
                      expected=f"one of {', '.join((*_LINEAR, *_BARE))}", found=match.string,
                      remedy="merge it with peft, and give regraft the result")  # fmt: skip
