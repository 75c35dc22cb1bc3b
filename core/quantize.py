"""`[output] quantize`: the linear layers of the blocks in bitsandbytes' stored form, which `from_pretrained` reloads.

What is written equals, byte for byte, what transformers 5.23 writes with bitsandbytes 0.50 after `load_in_4bit` (nf4,
blocks of 64, scales in fp32) or `load_in_8bit`; sources/bitsandbytes.py lists the tensors. Embeddings, head, norms,
biases, routers and experts stay as they are: transformers holds experts and routers in plain parameters, which its
quantiser passes over, so quantised ones could not be loaded.

Everything but the values is known at plan time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

from regraft.core.architectures import Architecture, Slot, architecture_of
from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.derived import TransposedTensor
from regraft.core.errors import Unsupported
from regraft.core.fourbit import OUTPUT_BLOCK_SIZE
from regraft.core.operations import Value
from regraft.core.patch import Edit, Patch
from regraft.core.quantised import int8_parts, nf4_parts
from regraft.core.realised import Gauge
from regraft.core.specs import ITEM_BYTES, NAME_OF_CODE
from regraft.core.tensors import LazyTensor

Method = Literal["nf4", "int8"]

_ATTENTION_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_ROLES = ("gate_proj", "up_proj", "down_proj")
_EMBEDDING_ROLES = ("embed_tokens", "position_embeddings")
_QUANTISABLE = ("F16", "BF16", "F32")
_OWN_LINEAR = {"falcon": "FalconLinear"}
"""Families whose linear layers are a class of their own, which transformers' quantiser passes over (measured, 5.23)."""


def quantize_patch(
    checkpoint: Checkpoint,
    method: Method,
    architecture: Architecture | None = None,
    gauges: Mapping[str, Gauge] = MappingProxyType({}),
) -> Patch:
    """The patch that stores the linear layers of the blocks quantised, and a config that says so.

    Args:
        checkpoint: what is quantised; nothing of it is read before the patch's tensors are.
        method: `nf4` or `int8`.
        architecture: its roles, where the caller knows them already.
        gauges: told how much of a change of these weights the codes keep.

    Raises:
        Unsupported: transformers cannot load this family quantised, or a weight is not float16, bfloat16 or float32.
        InputError: config.json and tensors are not those of one model.
    """
    architecture = architecture or architecture_of(checkpoint.config, checkpoint.specs)
    _check_family(checkpoint, architecture)
    slots = {slot.tensor: slot for slot in linear_slots(architecture) if slot.tensor in checkpoint.tensors}
    if not slots:
        raise Unsupported("the checkpoint has no linear layers to quantise", where=checkpoint.label,
                          remedy='use quantize = "none"')  # fmt: skip
    weights = [_weight(checkpoint, slot) for slot in slots.values()]
    store = nf4_parts if method == "nf4" else int8_parts
    parts = [part for weight in weights for part in store(weight, gauges.get(weight.spec.name))]
    # Parts of one byte an element may be of odd length: behind all others, they push nothing off its alignment.
    parts.sort(key=lambda part: -ITEM_BYTES[part.spec.dtype])
    edits = {part.spec.name: Edit(part.spec, Value(part)) for part in parts}
    config = _config(checkpoint, weights[0].spec.dtype, method, kept_modules(checkpoint, architecture, slots))
    return Patch(edits=edits, json={CONFIG: config}, notes=_notes(weights, method))


def linear_slots(architecture: Architecture) -> Iterator[Slot]:
    """Slots of the dense projections of every block; a fused tensor comes once for each of its roles."""
    for layer in range(architecture.num_layers):
        present = architecture.roles(layer)
        roles = _ATTENTION_ROLES if "router" in present else _ATTENTION_ROLES + _MLP_ROLES
        for role in roles:
            if role in present:
                yield architecture.slot(role, layer)


def _check_family(checkpoint: Checkpoint, architecture: Architecture) -> None:
    if (own := _OWN_LINEAR.get(architecture.model_type)) is not None:
        raise Unsupported(
            f"transformers cannot load a quantised {architecture.model_type} model: its quantiser passes over {own}",
            where=checkpoint.label,
            remedy='use quantize = "none"',
        )


def _weight(checkpoint: Checkpoint, slot: Slot) -> LazyTensor:
    """The weight as [out_features, in_features], the way in which quantised weights are stored."""
    tensor = checkpoint.tensors[slot.tensor]
    if tensor.spec.dtype not in _QUANTISABLE or len(tensor.spec.shape) != 2:
        raise Unsupported("cannot be quantised", where=f"{checkpoint.label}: {slot.tensor}",
                          expected=f"{', '.join(_QUANTISABLE)}, two dimensions", found=tensor.spec,
                          remedy='set [output] dtype = "bfloat16", or quantize = "none"')  # fmt: skip
    if not slot.transposed:
        return tensor
    return tensor.sources[0] if isinstance(tensor, TransposedTensor) else TransposedTensor(tensor)


def _config(checkpoint: Checkpoint, dtype: str, method: Method, kept: list[str]) -> dict[str, Any]:
    """What config.json gets: transformers' `quantization_config`, and the dtype of the rest, where it does not say."""
    name = NAME_OF_CODE[dtype]
    four_bit = method == "nf4"
    settings = {
        "_load_in_4bit": four_bit,
        "_load_in_8bit": not four_bit,
        "bnb_4bit_compute_dtype": name if four_bit else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four_bit else "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four_bit,
        "load_in_8bit": not four_bit,
        "quant_method": "bitsandbytes",
    }
    silent = not any(key in checkpoint.config for key in ("dtype", "torch_dtype"))
    return {"quantization_config": settings} | ({"dtype": name} if silent else {})


def kept_modules(checkpoint: Checkpoint, architecture: Architecture, slots: Mapping[str, Slot]) -> list[str]:
    """`llm_int8_skip_modules`: every linear module that stays as it is, by the end of its path where layers repeat.

    Loaders take the list for all there is to skip, so the head stands in it even where it is tied or named otherwise.
    """
    quantised = [name.removesuffix(".weight") for name in slots]
    outside = [architecture.slot(role).tensor for role in _EMBEDDING_ROLES if role in architecture.roles()]
    beside = [prefix.removesuffix(".") for prefix in architecture.layout.family.beside]
    kept = {"lm_head": None}
    for name, spec in checkpoint.specs.items():
        if not name.endswith(".weight") or len(spec.shape) != 2 or name in slots or name in outside:
            continue
        module = name.removesuffix(".weight")
        tower = next((prefix for prefix in beside if module.startswith(f"{prefix}.")), None)
        if tower is not None:
            # Checkpoints and stock classes name it differently, with and without `model.`.
            kept |= dict.fromkeys(prefix for prefix in beside if prefix.endswith(tower.rpartition(".")[2]))
            continue
        ending = _ending(module)
        kept[module if any(other.endswith(ending) for other in quantised) else ending] = None
    return list(kept)


def _ending(module: str) -> str:
    """What comes after the layer's number, without what comes after `experts`; the whole path outside layers."""
    path = re.split(r"\.\d+\.", module, maxsplit=1)[-1]
    return re.sub(r"\.experts\..*", ".experts", path)


def _notes(weights: list[LazyTensor], method: Method) -> tuple[str, ...]:
    notes = [f"{len(weights)} linear layers are quantised to {method}; the rest, head and experts included, is not"]
    odd = sum(weight.spec.shape[1] % OUTPUT_BLOCK_SIZE != 0 for weight in weights)
    if method == "nf4" and odd:
        notes.append(f"{odd} of them have rows that are no multiple of {OUTPUT_BLOCK_SIZE}: on CPUs with AVX512 "
                     "bitsandbytes (0.50) fails on them or computes with wrong scales")  # fmt: skip
    return tuple(notes)
