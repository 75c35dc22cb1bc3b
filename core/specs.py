"""What is known of a tensor before a byte of it is read: its name, dtype and shape."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regraft.core.errors import InputError

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors dtype code."""

FLOAT_CODES = frozenset({"F16", "BF16", "F32", "F64"})
"""The dtypes that steps compute with and that `[output] dtype` converts."""

CODE_OF_NAME = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""Safetensors code of the dtype names that configs and recipes use."""

NAME_OF_CODE = {code: name for name, code in CODE_OF_NAME.items()}

_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, safetensors dtype code (such as `BF16`) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Extent of the first dimension: the unit in which tensors are streamed; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.nbytes // self.rows if self.rows else 0

    def __str__(self) -> str:
        """`name BF16 [2048, 2048]`."""
        return f"{self.name} {self.dtype} {list(self.shape)}"


def torch_dtype(code: str) -> torch.dtype:
    """The torch dtype of a safetensors code.

    Raises:
        InputError: this torch has no such dtype.
    """
    import torch

    dtype = getattr(torch, _TORCH_NAMES[code], None)
    if dtype is None:
        raise InputError(
            f"this torch has no dtype for {code}", found=f"torch {torch.__version__}", remedy="use a newer torch"
        )
    return dtype  # type: ignore[no-any-return]


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype.

    Raises:
        InputError: safetensors cannot store it.
    """
    name = str(dtype).removeprefix("torch.")
    codes = [code for code, torch_name in _TORCH_NAMES.items() if torch_name == name]
    if not codes:
        raise InputError("safetensors has no such dtype", expected=f"one of {', '.join(_TORCH_NAMES)}", found=dtype)
    return codes[0]


def spec_of(name: str, tensor: torch.Tensor) -> TensorSpec:
    """The spec under which `tensor` would be stored as `name`."""
    return TensorSpec(name, dtype_code(tensor.dtype), tuple(tensor.shape))
