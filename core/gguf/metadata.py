"""Typed access to the metadata of a GGUF file, which remembers what was asked so that nothing is dropped unseen."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regraft.core.errors import InputError
from regraft.core.jsonio import brief

_LARGEST = 3.4e38
"""What fits 32 bits, in which GGUF keeps its floats."""

_CONVERT = "convert the original checkpoint again with a current llama.cpp"


class Metadata:
    """The key-value pairs of one file.

    Args:
        path: how messages name the file.
        values: what its header holds.
    """

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        self._asked: set[str] = set()

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        return self.text("general.architecture")

    def hyper(self, name: str) -> str:
        """The key of the hyperparameter `name`: keys of the model are prefixed with its architecture."""
        return f"{self.architecture}.{name}"

    def has(self, key: str) -> bool:
        """Whether the file has the key; counts as asking for it."""
        self._asked.add(key)
        return key in self.values

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number >= 0, possibly given as a list with one equal entry for each layer.

        Raises:
            InputError: missing without a default, of another type, or different from layer to layer.
        """
        value = self._get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            raise self.fault(
                key,
                "differs from layer to layer, which no supported architecture can express",
                expected="one number",
                found=brief(value),
            )
        if type(value) is not int or value < 0:
            raise self.fault(key, "has the wrong type", expected="a whole number >= 0", found=brief(value))
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; 32-bit floats come as the shortest decimal that rounds to them (1e-05, not 9.999999747e-06).

        Raises:
            InputError: missing without a default, or no finite number.
        """
        value = self._get(key, default)
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise self.fault(key, "has the wrong type", expected="a finite number", found=brief(value))
        return shortest(value)

    def text(self, key: str, default: str | None = None) -> str:
        """A string.

        Raises:
            InputError: missing without a default, or no string.
        """
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fault(key, "has the wrong type", expected="a string", found=brief(value))
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value.

        Raises:
            InputError: neither true nor false.
        """
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.fault(key, "has the wrong type", expected="true or false", found=brief(value))
        return value

    def sequence(self, key: str, kind: type[Any], length: int | None = None) -> list[Any]:
        """A list of strings, whole numbers or floats; empty if the file has none and no `length` is asked for.

        Raises:
            InputError: no such list, elements of another type, or another length.
        """
        value = self._get(key, [] if length is None else None)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.fault(key, "has the wrong type", expected=f"a list of {kind.__name__}", found=brief(value))
        if length is not None and len(value) != length:
            raise self.fault(key, "has the wrong length", expected=length, found=len(value))
        return value

    def unasked(self, prefix: str) -> list[str]:
        """Keys that begin with `prefix` and that nobody has asked for."""
        return sorted(key for key in self.values if key.startswith(prefix) and key not in self._asked)

    def ignore(self, keys: Iterable[str]) -> None:
        """Count `keys` as asked for: they are known to change nothing."""
        self._asked.update(keys)

    def fault(
        self, key: str, message: str, *, expected: object = None, found: object = None, remedy: str = _CONVERT
    ) -> InputError:
        """An error about one key."""
        return InputError(message, where=f"{self.path}: {key}", expected=expected, found=found, remedy=remedy)

    def _get(self, key: str, default: Any) -> Any:
        self._asked.add(key)
        value = self.values.get(key, default)
        if value is None:
            raise self.fault(key, "the metadata lacks a key", expected=f"a value for {key}")
        return value


def shortest(value: float) -> float:
    """The decimal with the fewest digits that has the same 32-bit float as `value`; integers stay what they are."""
    single = struct.pack("<f", value)
    for digits in range(1, 10):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == single:
            return candidate
    return value
