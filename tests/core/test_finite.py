"""NaN and Inf are found in every float dtype, and nothing else is called so."""

import pytest
import torch

from regraft.core.finite import NonFinite, count_in, count_non_finite, looks_finite
from regraft.core.tensors import MemoryTensor

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("bad", "count"),
    [(float("nan"), NonFinite(1, 0)), (float("inf"), NonFinite(0, 1)), (-float("inf"), NonFinite(0, 1))],
)
@pytest.mark.parametrize("place", [0, 17, 99])
def test_one_bad_value_is_found_anywhere(dtype, bad, count, place):
    values = torch.randn(100).to(dtype)
    assert looks_finite(values)
    values[place] = bad
    assert not looks_finite(values)
    assert count_non_finite(values) == count


@pytest.mark.parametrize("dtype", SMALL)
def test_small_floats_are_widened(dtype):
    values = torch.tensor([1.0, float("nan"), 2.0]).to(dtype)
    assert not looks_finite(values)
    assert count_non_finite(values) == NonFinite(1, 0)
    assert looks_finite(values[:1])


def test_the_largest_finite_values_are_finite():
    for dtype in FLOATS:
        info = torch.finfo(dtype)
        assert looks_finite(torch.tensor([info.max, info.min, info.tiny, 0.0, -0.0], dtype=dtype))


@pytest.mark.parametrize("values", [torch.tensor([1, 2]), torch.tensor([True]), torch.zeros(0), torch.zeros(3, 0)])
def test_integers_and_empty_tensors_are_finite(values):
    assert looks_finite(values)
    assert not count_non_finite(values)


def test_a_lazy_tensor_is_counted_piece_by_piece():
    values = torch.ones(600_000, 2)
    values[[0, 300_000, 599_999], 1] = float("nan")
    values[5, 0] = float("inf")
    assert count_in(MemoryTensor("x", values)) == NonFinite(3, 1)
    assert str(NonFinite(3, 1)) == "3 NaN, 1 Inf"
    assert not NonFinite()
    assert NonFinite(1, 2) + NonFinite(3, 4) == NonFinite(4, 6)
