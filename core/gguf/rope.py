"""`rope_parameters` of transformers from the metadata and the factor tensors of a GGUF file.

What llama.cpp does, hence what is expressed here: `linear` (also a factor without a type) divides every frequency;
`yarn` interpolates them between two numbers of rotations and scales attention by 1 + 0.1 ln(factor); rope_freqs.weight
divides each frequency by a number of its own (Llama 3.1 and later); rope_factors_short.weight and
rope_factors_long.weight do the same for short and for long inputs (LongRoPE).
"""

from __future__ import annotations

import math
import os
import struct
from typing import Any

from regraft.core.errors import InputError
from regraft.core.gguf.metadata import Metadata, shortest
from regraft.core.gguf.tensors import GgufFile
from regraft.core.jsonio import brief

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"

_ORIGINAL = "rope.scaling.original_context_length"
_NEUTRAL = {"rope.scaling.yarn_log_multiplier": 0.0, "rope.scaling.yarn_ext_factor": 1.0}
"""Refinements of yarn at the values where they do nothing; stock transformers has no switch for them."""

_LLAMA3_CONTEXT, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
"""What every published Llama 3.x configuration has; llama.cpp's converter uses the first whatever the config says."""

_TOLERANCE = 1e-5


def rope_parameters(file: GgufFile, meta: Metadata, *, dim: int, default_theta: float = 10000.0) -> dict[str, Any]:
    """The rotary embedding of a whole model (of its global layers, where there are local ones).

    Args:
        file: for the factor tensors.
        meta: its metadata.
        dim: how many dimensions of a head are rotated.
        default_theta: base frequency where the file names none.

    Raises:
        InputError: a scaling that no stock rope type of transformers expresses exactly.
    """
    base = {"rope_theta": meta.number(meta.hyper("rope.freq_base"), default_theta)}
    scaled = meta.number(meta.hyper("rope.scaling.factor"), 1.0) not in {0.0, 1.0}
    kind = meta.text(meta.hyper("rope.scaling.type"), "linear" if scaled else "none")
    meta.ignore(meta.hyper(name) for name in (_ORIGINAL, "rope.scaling.finetuned"))
    _check_neutral(meta)
    if FREQUENCIES in file.header.tensors:
        if kind != "none":
            raise _inexpressible(file, FREQUENCIES, f"no rope.scaling.type beside {FREQUENCIES}", brief(kind))
        return _llama3(file, meta, base, dim)
    if LONG in file.header.tensors or SHORT in file.header.tensors:
        return _longrope(file, meta, base, dim)
    if kind == "linear":
        return {"rope_type": "linear", **base, "factor": _factor(meta)}
    if kind == "yarn":
        return _yarn(meta, base)
    if kind == "none":
        legacy = meta.number(meta.hyper("rope.scale_linear"), 1.0)
        return {"rope_type": "linear", **base, "factor": legacy} if legacy != 1.0 else {"rope_type": "default", **base}
    raise meta.fault(
        meta.hyper("rope.scaling.type"),
        "is a rope scaling that regraft cannot express",
        expected="none, linear or yarn, or longrope with its factor tensors",
        found=brief(kind),
        remedy="start from the original safetensors checkpoint",
    )


def _factor(meta: Metadata) -> float:
    key = meta.hyper("rope.scaling.factor")
    factor = meta.number(key)
    if factor < 1:
        raise meta.fault(key, "is an impossible rope scaling", expected="1 or more", found=factor)
    return factor


def _check_neutral(meta: Metadata) -> None:
    for name, neutral in _NEUTRAL.items():
        key = meta.hyper(name)
        if meta.number(key, neutral) != neutral:
            raise meta.fault(
                key,
                "is a refinement of yarn that stock transformers does not have",
                expected=neutral,
                found=meta.number(key),
                remedy="start from the original safetensors checkpoint",
            )


def _yarn(meta: Metadata, base: dict[str, Any]) -> dict[str, Any]:
    original = meta.integer(meta.hyper(_ORIGINAL), meta.integer(meta.hyper("context_length")))
    result = {"rope_type": "yarn", **base, "factor": _factor(meta), "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        key = meta.hyper(f"rope.scaling.yarn_{name}")
        if meta.has(key):
            result[name] = meta.number(key)
    return result


def _llama3(file: GgufFile, meta: Metadata, base: dict[str, Any], dim: int) -> dict[str, Any]:
    """The llama3 parameters that give the stored divisors; only their largest, the factor, is free."""
    divisors = _floats(file, FREQUENCIES, dim // 2)
    factor = shortest(max(divisors))
    if factor == 1.0:
        return {"rope_type": "default", **base}
    context = meta.integer(meta.hyper(_ORIGINAL), _LLAMA3_CONTEXT)
    expected = [_llama3_divisor(base["rope_theta"] ** (2 * i / dim), factor, context) for i in range(dim // 2)]
    if not all(
        math.isclose(found, wanted, rel_tol=_TOLERANCE) for found, wanted in zip(divisors, expected, strict=True)
    ):
        at = max(range(len(expected)), key=lambda i: abs(divisors[i] / expected[i] - 1))
        raise _inexpressible(
            file,
            FREQUENCIES,
            f"{expected[at]:.6g} for frequency {at}, as Llama 3.x with factor {factor:g}",
            f"{divisors[at]:.6g}",
        )
    return {
        "rope_type": "llama3",
        **base,
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": context,
    }


def _llama3_divisor(period: float, factor: float, context: int) -> float:
    """What llama3 scaling divides the frequency 1 / `period` by: 1 if it turns often within the context, `factor` if
    less than once, and in between a mean.
    """
    turns = context / (2 * math.pi * period)
    if turns > _LLAMA3_HIGH:
        return 1.0
    if turns < _LLAMA3_LOW:
        return factor
    smooth = (turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    return 1 / ((1 - smooth) / factor + smooth)


def _longrope(file: GgufFile, meta: Metadata, base: dict[str, Any], dim: int) -> dict[str, Any]:
    result = {
        "rope_type": "longrope",
        **base,
        "short_factor": [shortest(value) for value in _floats(file, SHORT, dim // 2)],
        "long_factor": [shortest(value) for value in _floats(file, LONG, dim // 2)],
        "original_max_position_embeddings": meta.integer(meta.hyper(_ORIGINAL)),
    }
    attention = meta.hyper("rope.scaling.attn_factor")
    if meta.has(attention):
        result["attention_factor"] = meta.number(attention)
    return result


def _floats(file: GgufFile, name: str, count: int) -> list[float]:
    stored = file.header.tensors.get(name)
    if stored is None or stored.type_name != "F32" or stored.shape != (count,):
        found = "no such tensor" if stored is None else f"{stored.type_name} {list(stored.shape)}"
        raise _inexpressible(file, name, f"F32 [{count}]", found)
    data = os.pread(file.descriptor, stored.nbytes, stored.offset)
    values = [value for (value,) in struct.iter_unpack("<f", data)]
    if len(values) != count or not all(0 < value < math.inf for value in values):
        raise _inexpressible(file, name, f"{count} positive finite factors", values[:4])
    return values


def _inexpressible(file: GgufFile, name: str, expected: object, found: object) -> InputError:
    return InputError(
        "are rope factors that no stock rope type expresses",
        where=f"{file.path}: {name}",
        expected=expected,
        found=found,
        remedy="start from the original safetensors checkpoint",
    )
