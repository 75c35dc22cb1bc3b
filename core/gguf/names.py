"""Which tensor of a GGUF file is which tensor of transformers, with what shape, and what the converter did to it.

Naming and conversions: llama.cpp's gguf-py/gguf/tensor_mapping.py and conversion/{llama,qwen,gemma,phi}.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from regraft.core.errors import InputError
from regraft.core.gguf.reader import GgufHeader
from regraft.core.gguf.tensors import AS_IT_IS, GgufFile, GgufTensor, Layout

ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})
"""Not weights: factors of the rotary frequencies, which the config expresses."""

_EMBEDDING, _NORM, _HEAD = "token_embd.weight", "output_norm.weight", "output.weight"
_SHIFTED = Layout(shift=1.0)

LLAMA_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GEMMA_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of one model; `head_dim` is the width of a query, key or value head."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Naming:
    """What is particular about the tensors of one family.

    Args:
        norms: norms of a layer, GGUF name -> transformers name.
        interleaved: query and key rows are permuted for llama.cpp's rotary embedding (attention with split q, k, v).
        head_norms: queries and keys have norms of their own.
        shifted_norms: 1 was added to every norm weight.
        fused: q, k, v are one matrix, and so are gate and up.
        biases: the projections whose biases are present, by GGUF name.
    """

    norms: dict[str, str]
    interleaved: bool = False
    head_norms: bool = False
    shifted_norms: bool = False
    fused: bool = False
    biases: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Slot:
    """One expected tensor: its name in the file and in transformers, its shape, and its layout in the file."""

    source: str
    target: str
    shape: tuple[int, ...]
    layout: Layout = AS_IT_IS


def biases(header: GgufHeader) -> frozenset[str]:
    """The projections of layer 0 that have a bias, such as `attn_q`."""
    prefix, suffix = "blk.0.", ".bias"
    names = (name for name in header.tensors if name.startswith(prefix) and name.endswith(suffix))
    return frozenset(name.removeprefix(prefix).removesuffix(suffix) for name in names)


def tied(header: GgufHeader) -> bool:
    """Whether the output head is the embedding: llama.cpp writes a head only when it is another matrix."""
    return _HEAD not in header.tensors


def named_tensors(file: GgufFile, sizes: Sizes, naming: Naming) -> dict[str, GgufTensor]:
    """Every weight of the file under its name in transformers, in the order of its bytes.

    Raises:
        InputError: a tensor is missing, has another shape than the metadata says, or is none that the family has.
    """
    slots = {slot.source: slot for slot in _slots(file.header, sizes, naming)}
    _check_missing(file.path, file.header, slots)
    result = {}
    for name, stored in file.header.tensors.items():
        if name in ROPE_TENSORS:
            continue
        slot = slots.get(name)
        if slot is None:
            raise InputError(
                "holds a tensor that no stock class of this architecture has",
                where=f"{file.path}: {name}",
                expected="the tensors of a dense decoder of this family",
                found=list(stored.shape),
                remedy="start from the original safetensors checkpoint",
            )
        if stored.shape != slot.shape:
            raise InputError(
                "the shape contradicts the metadata",
                where=f"{file.path}: {name}",
                expected=list(slot.shape),
                found=list(stored.shape),
                remedy="the file is damaged or was made for another architecture: fetch it again",
            )
        result[slot.target] = GgufTensor(file, stored, slot.target, slot.layout)
    return result


def _check_missing(path: Path, header: GgufHeader, slots: dict[str, Slot]) -> None:
    missing = [name for name in slots if name not in header.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            "lacks a tensor that its architecture needs",
            where=f"{path}: {missing[0]}",
            expected=f"{missing[0]}{more}",
            found=f"{len(header.tensors)} tensors",
            remedy="the file is incomplete or a part of a split model: fetch or merge it again",
        )


def _slots(header: GgufHeader, sizes: Sizes, naming: Naming) -> Iterator[Slot]:
    norm = _SHIFTED if naming.shifted_norms else AS_IT_IS
    matrix = (sizes.vocab_size, sizes.hidden_size)
    yield Slot(_EMBEDDING, "model.embed_tokens.weight", matrix)
    yield Slot(_NORM, "model.norm.weight", (sizes.hidden_size,), norm)
    if not tied(header):
        yield Slot(_HEAD, "lm_head.weight", matrix)
    for layer in range(sizes.num_layers):
        source, target = f"blk.{layer}.", f"model.layers.{layer}."
        for old, new in naming.norms.items():
            yield Slot(f"{source}{old}.weight", f"{target}{new}.weight", (sizes.hidden_size,), norm)
        if naming.head_norms:
            for letter in "qk":
                yield Slot(
                    f"{source}attn_{letter}_norm.weight",
                    f"{target}self_attn.{letter}_norm.weight",
                    (sizes.head_dim,),
                    norm,
                )
        for old, (new, rows, columns, layout) in _projections(sizes, naming).items():
            yield Slot(f"{source}{old}.weight", f"{target}{new}.weight", (rows, columns), layout)
            if old in naming.biases:
                yield Slot(f"{source}{old}.bias", f"{target}{new}.bias", (rows,), layout)


def _projections(sizes: Sizes, naming: Naming) -> dict[str, tuple[str, int, int, Layout]]:
    """Linear layers of a block: GGUF name -> transformers name, output features, input features, layout."""
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    rotary = Layout(rotary_head_dim=sizes.head_dim) if naming.interleaved else AS_IT_IS
    common = {
        "attn_output": ("self_attn.o_proj", hidden, queries, AS_IT_IS),
        "ffn_down": ("mlp.down_proj", hidden, inner, AS_IT_IS),
    }
    if naming.fused:
        return common | {
            "attn_qkv": ("self_attn.qkv_proj", queries + 2 * keys, hidden, AS_IT_IS),
            "ffn_up": ("mlp.gate_up_proj", 2 * inner, hidden, AS_IT_IS),
        }
    return common | {
        "attn_q": ("self_attn.q_proj", queries, hidden, rotary),
        "attn_k": ("self_attn.k_proj", keys, hidden, rotary),
        "attn_v": ("self_attn.v_proj", keys, hidden, AS_IT_IS),
        "ffn_gate": ("mlp.gate_proj", inner, hidden, AS_IT_IS),
        "ffn_up": ("mlp.up_proj", inner, hidden, AS_IT_IS),
    }
