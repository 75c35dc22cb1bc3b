"""Four-bit weights as bitsandbytes stores them: two codes a byte, and one scale for each block of the flattened weight.

`value = table[code] · absmax[block]`; the first of two codes is in the high half of its byte. NF4 is defined in QLoRA
(arXiv 2305.14314), appendix E; FP4 is bitsandbytes' own: a sign, two bits of exponent, one of mantissa. The arithmetic
here is that of bitsandbytes' `dequantize_4bit` and `quantize_4bit`, bit for bit, without importing it: that takes
seconds, its CPU quantiser needs 2.2 times as long (25 against 11 ns an element), and on CPUs with AVX512 its
dequantiser takes wrong scales where a row is no whole number of blocks (0.50.2: error 0.26 of the norm instead of
0.09).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regraft.core.errors import InputError
from regraft.core.jsonio import parse_object
from regraft.core.specs import CODE_OF_NAME, NAME_OF_CODE

if TYPE_CHECKING:
    import torch

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

_SMALLEST_SCALE = 1e-38
"""Blocks of zeros are divided by this instead of by zero."""

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
        """The JSON text of a state without quantised scales, byte for byte as bitsandbytes packs it into a tensor."""
        document = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": NAME_OF_CODE[self.dtype],
            "shape": list(self.shape),
        }
        return json.dumps(document).encode()


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

    shape, dtype = document.get("shape"), document.get("dtype")
    if document.get("quant_type") not in TABLES:
        raise fault("quant_type", "nf4 or fp4")
    if document.get("blocksize") not in BLOCK_SIZES:
        raise fault("blocksize", f"one of {', '.join(map(str, BLOCK_SIZES))}")
    if dtype not in ("float16", "bfloat16", "float32"):
        raise fault("dtype", "float16, bfloat16 or float32")
    if not isinstance(shape, list) or not shape or not all(type(size) is int and size > 0 for size in shape):
        raise fault("shape", "a list of sizes")
    return State(
        document["quant_type"],
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
    if not isinstance(offset, int | float) or isinstance(offset, bool):
        raise fault("nested_offset", "a number")
    return Nested(block_size, float(offset))


def pair_table(quant_type: str, device: str) -> torch.Tensor:
    """For each byte the values of its two codes, [256] pairs of fp32, each pair seen as one int64.

    Looking up pairs takes 0.9 ns an element, single codes 20 ns.
    """
    import torch

    table = torch.tensor(TABLES[quant_type], dtype=torch.float32)
    high, low = table.repeat_interleave(16), table.repeat(16)
    return torch.stack([high, low], dim=1).view(torch.int64).view(-1).to(device)


def decode(codes: torch.Tensor, scales: torch.Tensor, pairs: torch.Tensor, block_size: int, count: int) -> torch.Tensor:
    """Values of whole blocks; the last block may be shorter.

    Args:
        codes: uint8 [(count + 1) // 2], two codes a byte, beginning at a block.
        scales: fp32 [ceil(count / block_size)].
        pairs: `pair_table`.
        block_size: elements that share a scale.
        count: how many values are wanted.

    Returns:
        fp32 [count].
    """
    import torch

    values = pairs.index_select(0, codes.int()).view(torch.float32)[:count]
    full = count // block_size
    values[: full * block_size].view(full, block_size).mul_(scales[:full, None])
    if full < len(scales):
        values[full * block_size :].mul_(scales[full])
    return values


def encode_nf4(values: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """NF4 codes of whole blocks; the last block may be shorter.

    The code of a value is the number of midpoints of the table below it, counted one midpoint at a time: passes over a
    cached piece, 11 ns an element, where `torch.bucketize` needs 21.

    Args:
        values: [count], float16, bfloat16 or float32.
        scales: `block_scales` of them.
        block_size: elements that share a scale.

    Returns:
        uint8 [(count + 1) // 2], two codes a byte; a missing last code is that of zero.
    """
    import torch

    table = torch.tensor(NF4, dtype=torch.float32)
    scaled = _scaled(values.float(), scales, block_size)
    if len(scaled) % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    codes = torch.zeros(len(scaled), dtype=torch.uint8, device=values.device)
    above = torch.empty(len(scaled), dtype=torch.bool, device=values.device)
    for midpoint in ((table[:-1] + table[1:]) / 2).tolist():
        torch.gt(scaled, midpoint, out=above)
        codes.add_(above.view(torch.uint8))
    high, low = codes.view(-1, 2).unbind(1)
    return (high << 4).bitwise_or_(low)


def _scaled(values: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """Values between -1 and 1: full blocks times a reciprocal, a short last one by division, as bitsandbytes does."""
    import torch

    full = len(values) // block_size
    blocks = values[: full * block_size].view(full, block_size)
    scaled = (blocks * scales[:full, None].clamp(min=_SMALLEST_SCALE).reciprocal()).view(-1)
    if full < len(scales):
        scaled = torch.cat([scaled, values[full * block_size :] / scales[full]])
    return scaled.clamp_(-1, 1)


def block_scales(values: torch.Tensor, block_size: int) -> torch.Tensor:
    """The largest magnitude of each block, fp32 [ceil(count / block_size)]; the last block may be shorter.

    Args:
        values: [count], float16, bfloat16 or float32.
        block_size: elements that share a scale.
    """
    import torch

    full = len(values) // block_size
    scales = values[: full * block_size].view(full, block_size).abs().amax(dim=1).float()
    if full * block_size == len(values):
        return scales
    last = values[full * block_size :].abs().max().float().clamp(min=_SMALLEST_SCALE)
    return torch.cat([scales, last[None]])
