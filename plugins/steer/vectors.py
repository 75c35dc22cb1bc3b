"""The file of steering vectors: names that say where each goes, and finite values. Read without torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy

from regraft.core.errors import InputError
from regraft.core.offsets import HeadOffset, Offset, ResidualBias
from regraft.core.recipe.suggest import did_you_mean
from regraft.core.specs import FLOAT_CODES
from regraft.core.tensors import FileTensor, WeightFile

TEMPLATES = ("layers.N.attn_out", "layers.N.mlp_out", "layers.N.heads.N", "layers.N.kv_groups.N")
"""The names that there are; N stands for a number."""

_NUMBER = r"(0|[1-9][0-9]{0,8})"
_NAME = re.compile(rf"layers\.{_NUMBER}\.(?:(attn_out|mlp_out)|(heads|kv_groups)\.{_NUMBER})")
_SHOWN = 5


def read_vectors(path: Path, strength: float) -> list[Offset]:
    """The offsets in the file `path`, each times `strength`.

    Raises:
        InputError: there is no such file; it is no safetensors file, or empty; a name says no place; a tensor is no
            float tensor or holds NaN or Inf.
    """
    if not path.is_file():
        raise InputError("there is no such file of vectors", where=path, expected="a .safetensors file",
                         remedy="check the path, which starts at the recipe's folder")  # fmt: skip
    tensors = WeightFile(path).tensors()
    if not tensors:
        raise InputError("the file has no vectors", where=path, expected=" or ".join(TEMPLATES),
                         remedy="save at least one")  # fmt: skip
    unknown = [name for name in tensors if _NAME.fullmatch(name) is None]
    if unknown:
        raise _unknown(path, unknown)
    return [_offset(path, name, tensor, strength) for name, tensor in tensors.items()]


def _offset(path: Path, name: str, tensor: FileTensor, strength: float) -> Offset:
    if tensor.spec.dtype not in FLOAT_CODES:
        raise InputError("is no float tensor", where=f"{path}: {name}", expected=", ".join(sorted(FLOAT_CODES)),
                         found=tensor.spec.dtype, remedy="save the vectors unquantised")  # fmt: skip
    _check_finite(path, tensor)
    match = _NAME.fullmatch(name)
    assert match is not None
    layer, site, kind, index = match.groups()
    if kind is not None:
        head_site = "head" if kind == "heads" else "kv-group"
        return HeadOffset(int(layer), int(index), tensor, head_site, strength)  # type: ignore[arg-type]
    return ResidualBias(int(layer), site, tensor, strength)  # type: ignore[arg-type]


def _check_finite(path: Path, tensor: FileTensor) -> None:
    where = f"{path}: {tensor.spec.name}"
    nan = infinite = 0
    for values in _pieces(path, tensor):
        nan += int(numpy.isnan(values).sum())
        infinite += int(numpy.isinf(values).sum())
    if nan or infinite:
        raise InputError("the vector is not finite", where=where, expected="numbers",
                         found=f"{nan} NaN, {infinite} Inf", remedy="compute it again")  # fmt: skip


def _pieces(path: Path, tensor: FileTensor) -> Iterator[numpy.ndarray]:
    """The values, a million at a time; bf16 widened to fp32, exactly."""
    codes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    stored = numpy.dtype(codes[tensor.spec.dtype])
    left = tensor.spec.nbytes
    with path.open("rb") as file:
        file.seek(tensor.raw.offset)
        while left:
            data = file.read(min(left, stored.itemsize << 20))
            if not data:
                raise InputError("the file ends too early", where=path, remedy="fetch it again")
            left -= len(data)
            values = numpy.frombuffer(data, dtype=stored)
            yield (values.astype("<u4") << 16).view("<f4") if tensor.spec.dtype == "BF16" else values


def _unknown(path: Path, names: list[str]) -> InputError:
    first = names[0]
    shown = ", ".join(map(ascii, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    suggestion = suggest(first)
    hint = f"; {suggestion}" if suggestion else ""
    return InputError(
        "a tensor's name says no place in a model",
        where=f"{path}: {ascii(first)[1:-1]}",
        expected=f"{' or '.join(TEMPLATES)}, N a number from 0",
        found=shown,
        remedy=f"rename {'it' if len(names) == 1 else 'them'}{hint}",
    )


def suggest(name: str) -> str | None:
    """`did you mean "layers.3.attn_out"?` for a name that is nearly one; None where nothing is near."""
    numbers = [str(int(digits)) for digits in re.findall(r"[0-9]{1,9}", name)]
    question = did_you_mean(re.sub(r"[0-9]+", "N", name), TEMPLATES)
    if question is None or question.count("N") != len(numbers):
        return question
    for number in numbers:
        question = question.replace("N", number, 1)
    return question
