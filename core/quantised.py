"""The tensors that store one quantised weight, by its form."""

from __future__ import annotations

import struct
from dataclasses import replace

from regraft.core.dequantised import EightBitTensor, FourBitTensor
from regraft.core.derived import ConstantTensor
from regraft.core.fourbit import NF4, OUTPUT_BLOCK_SIZE, STATE_MARK, State
from regraft.core.fourbit_parts import FourBitCodes, FourBitScales, NestedScales, ScaleCodes, StateText
from regraft.core.int8_parts import Int8Codes, Int8Scales
from regraft.core.realised import Gauge
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor

Stored = FourBitTensor | EightBitTensor
"""A weight of a base that bitsandbytes quantised, as it is shown."""


def nf4_parts(weight: LazyTensor, gauge: Gauge | None = None) -> list[LazyTensor]:
    """The tensors that store `weight` [rows, columns] in NF4.

    A weight that came out of exactly this form gives the stored tensors themselves, which are then copied.
    """
    name, state = weight.spec.name, State("nf4", OUTPUT_BLOCK_SIZE, weight.spec.dtype, weight.spec.shape)
    table = ConstantTensor(TensorSpec(f"{name}.quant_map", "F32", (len(NF4),)), struct.pack("<16f", *NF4))
    if isinstance(weight, FourBitTensor) and weight.state == state and weight.codes.spec.dtype == "U8":
        return [weight.codes, weight.scales, table, _state_text(name, state)]
    return [FourBitCodes(weight, state, gauge=gauge), FourBitScales(weight, state), table, _state_text(name, state)]


def int8_parts(weight: LazyTensor, gauge: Gauge | None = None) -> list[LazyTensor]:
    """The tensors that store `weight` [rows, columns] in 8 bits, one scale a row; stored ones are given as they are."""
    module = weight.spec.name.removesuffix("weight")
    form = ConstantTensor(TensorSpec(f"{module}weight_format", "U8", ()), b"\0")
    if isinstance(weight, EightBitTensor):
        return [*weight.sources, form]
    return [Int8Codes(weight, gauge), Int8Scales(weight, f"{module}SCB"), form]


def parts_like(weight: LazyTensor, stored: Stored, gauge: Gauge | None) -> list[LazyTensor]:
    """The computed tensors that store `weight` [rows, columns] in the form of `stored`: type, block size, scales.

    What does not depend on values is not among them: tables, and a state whose shape stays and that names no mean.

    Args:
        weight: float values.
        stored: a weight of the base.
        gauge: told how much of the change the codes keep.
    """
    name = weight.spec.name
    if isinstance(stored, EightBitTensor):
        return [Int8Codes(weight, gauge), Int8Scales(weight, f"{name.removesuffix('weight')}SCB")]
    state, storage = replace(stored.state, shape=weight.spec.shape), stored.codes.spec.dtype
    doubly = stored.nested_map is not None
    codes = FourBitCodes(weight, state, storage, gauge=gauge, stored=stored if doubly else None)
    if not doubly:
        text = [] if state == stored.state else [_state_text(name, state)]
        return [codes, FourBitScales(weight, state), *text]
    return [codes, *(kind(weight, state, stored) for kind in (ScaleCodes, NestedScales, StateText))]


def _state_text(name: str, state: State) -> ConstantTensor:
    data = state.dump()
    return ConstantTensor(TensorSpec(f"{name}{STATE_MARK}{state.quant_type}", "U8", (len(data),)), data)
