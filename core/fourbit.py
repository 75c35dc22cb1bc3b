"""Four-bit weights as bitsandbytes stores them: two codes a byte, and one scale for each block of the flattened weight.

`value = table[code] · absmax[block]`. NF4 is defined in QLoRA (arXiv 2305.14314), appendix E; FP4 is bitsandbytes' own:
a sign, two bits of exponent, one of mantissa. What is known without torch stands here; the arithmetic is in
`regraft.kernels.four_bit`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from regraft.core.errors import InputError
from regraft.core.jsonio import parse_object
from regraft.core.specs import CODE_OF_NAME, NAME_OF_CODE

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The value of each NF4 code."""

_FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12)

FP4 = (*_FP4_MAGNITUDES, 0.0, *(-magnitude for magnitude in _FP4_MAGNITUDES[1:]))
"""The value of each FP4 code."""

TABLES: Mapping[str, tuple[float, ...]] = {"nf4": NF4, "fp4": FP4}

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
OUTPUT_BLOCK_SIZE = 64
"""What transformers writes; it offers no other."""

STATE_MARK = ".quant_state.bitsandbytes__"
"""Stands between the name of a weight and its quantisation type in the name of its state."""

_LONGEST_NUMBER = len("-1.2345678901234567e-308")
_WRONG_STATE = "the checkpoint is damaged, or was written by other software than bitsandbytes: fetch it again"


@dataclass(frozen=True)
class Nested:
    """How the scales are quantised in their turn: `absmax = nested_map[code] · nested_absmax[block] + offset`."""

    block_size: int
    offset: float


@dataclass(frozen=True)
class State:
    """The part of a weight's quantisation state that is no tensor.

    Args:
        quant_type: `nf4` or `fp4`.
        block_size: elements that share a scale, counted along the flattened weight.
        dtype: safetensors code of the dtype that it dequantises to.
        shape: shape of the weight.
        nested: present where the scales are quantised too.
    """

    quant_type: str
    block_size: int
    dtype: str
    shape: tuple[int, ...]
    nested: Nested | None = None

    def dump(self) -> bytes:
        """The JSON text, byte for byte as bitsandbytes packs it into a tensor."""
        document = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": NAME_OF_CODE[self.dtype],
            "shape": list(self.shape),
        }
        if self.nested is not None:
            document |= {
                "nested_blocksize": self.nested.block_size,
                "nested_dtype": "float32",
                "nested_offset": self.nested.offset,
            }
        return json.dumps(document).encode()

    @property
    def longest(self) -> int:
        """The most bytes that `dump` takes, whatever the offset."""
        if self.nested is None:
            return len(self.dump())
        return len(replace(self, nested=replace(self.nested, offset=0.0)).dump()) - len("0.0") + _LONGEST_NUMBER


def parse_state(data: bytes, where: str, *, nested: bool) -> State:
    """Read the JSON text of a state.

    Args:
        data: the bytes of the tensor `...quant_state.bitsandbytes__nf4`.
        where: the tensor, for messages.
        nested: whether there are tensors of quantised scales, which the text then must describe.

    Raises:
        InputError: not JSON, or a value that bitsandbytes would not write.
    """
    document = parse_object(data, where)

    def fault(key: str, expected: object) -> InputError:
        return InputError("the quantisation state is malformed", where=f"{where}: {key}", expected=expected,
                          found=repr(document.get(key)), remedy=_WRONG_STATE)  # fmt: skip

    shape, dtype, kind = document.get("shape"), document.get("dtype"), document.get("quant_type")
    if not isinstance(kind, str) or kind not in TABLES:
        raise fault("quant_type", "nf4 or fp4")
    if type(document.get("blocksize")) is not int or document["blocksize"] not in BLOCK_SIZES:
        raise fault("blocksize", f"one of {', '.join(map(str, BLOCK_SIZES))}")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise fault("dtype", "float16, bfloat16 or float32")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise fault("shape", "a list of sizes")
    return State(
        kind,
        document["blocksize"],
        CODE_OF_NAME[dtype],
        tuple(shape),
        _parse_nested(document, fault) if nested else None,
    )


def _parse_nested(document: Mapping[str, Any], fault: Any) -> Nested:
    block_size, offset = document.get("nested_blocksize"), document.get("nested_offset")
    if type(block_size) is not int or block_size < 1:
        raise fault("nested_blocksize", "the number of scales in a block")
    if document.get("nested_dtype") != "float32":
        raise fault("nested_dtype", "float32")
    if not isinstance(offset, int | float) or isinstance(offset, bool) or not abs(offset) <= sys.float_info.max:
        raise fault("nested_offset", "a finite number")
    return Nested(block_size, float(offset))
