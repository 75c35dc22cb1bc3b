"""Layers as recipes name them."""

import pytest
from pydantic import TypeAdapter, ValidationError

from regraft.core.errors import UsageError
from regraft.core.layers import Layers, layers_of

READ = TypeAdapter(Layers)


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        ("3", [3]), ("2-4", [2, 3, 4]), ("4-", [4, 5]), ("-1", [0, 1]), ("0-5", [0, 1, 2, 3, 4, 5]), ("5-5", [5]),
        (3, [3]), ([4, 0, 4], [0, 4]),
    ],
)  # fmt: skip
def test_what_is_meant(given, layers):
    assert layers_of(READ.validate_python(given), 6) == layers


@pytest.mark.parametrize("given", ["6", "4-3", "2-6", "6-", 6, (0, 6)])
def test_what_is_not_there(given):
    with pytest.raises(UsageError, match="no such layers") as caught:
        layers_of(given, 6)
    assert "0 to 5" in caught.value.expected


@pytest.mark.parametrize("given", ["", "-", "a", "1-2-3", "1,2", -1, [], [-1], 1.5, "1" * 7])
def test_what_is_no_layer(given):
    with pytest.raises(ValidationError):
        READ.validate_python(given, strict=True)
