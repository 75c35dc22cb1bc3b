"""Operations on lazy tensors: closed forms, one rounding, shapes, and what the stored inputs are."""

from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import save_file

from regraft.core.errors import PluginError
from regraft.core.operations import ComputedTensor, Convert, Operation, ScaleRows, Value, leaves
from regraft.core.patch import Renamed
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor, WeightFile, row_chunks
from tests.checkpoints import bits
from tests.core.writing import Flip


def memory(name, *shape, dtype=torch.bfloat16, seed=0):
    return MemoryTensor(name, torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def computed(spec, operation, *inputs):
    return ComputedTensor(spec, operation, inputs)


@dataclass(frozen=True)
class Returns(Operation):
    """Gives whatever it is told to."""

    values: torch.Tensor
    row_local: bool = True

    def prepare(self, device):
        return lambda start, stop, *rows: self.values


def chunked(tensor, step):
    read = tensor.open()
    rows = [read(start, min(start + step, tensor.spec.rows)) for start in range(0, tensor.spec.rows, step)]
    return torch.cat(rows).reshape(tensor.spec.shape)


@pytest.mark.parametrize("code", ["F16", "F32", "F64", "BF16"])
def test_convert_rounds_once(code):
    source = memory("x", 5, 3, dtype=torch.float64)
    result = computed(TensorSpec("x", code, (5, 3)), Convert("x"), source)
    expected = source.load().to(result.load().dtype)
    assert bits(result.load()) == bits(expected) == bits(chunked(result, 2))
    assert result.raw is None
    assert result.row_local


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 2)])
def test_scale_rows_computes_in_fp32(offset, shape):
    source, factors = memory("x", *shape), memory("factors", 6, seed=1)
    result = computed(source.spec, ScaleRows("x", factors, offset), source)
    factor = factors.load().float().view(6, *[1] * (len(shape) - 1))
    expected = ((source.load().float() + offset) * factor - offset).bfloat16()
    assert bits(result.load()) == bits(expected) == bits(chunked(result, 4))
    assert ScaleRows.restore(("x",), {"offset": offset}, {"factors": factors}) == ScaleRows("x", factors, offset)
    assert result.operation.parameters == {"offset": offset}
    assert result.held_bytes == 2 * 12 + source.held_bytes


@pytest.mark.parametrize("count", [1, 5])
def test_too_few_factors_are_refused_and_not_broadcast(count):
    source = memory("x", 6, 3)
    result = computed(source.spec, ScaleRows("x", memory("factors", count)), source)
    with pytest.raises(PluginError, match="fewer factors"):
        result.load()


def test_a_value_is_copied_from_its_file_only_as_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.arange(6.0).reshape(2, 3)}, path)
    stored = WeightFile(path).tensors()["x"]
    assert computed(stored.spec, Value(stored)).raw == stored.raw
    assert computed(stored.spec, Value(stored)).held_bytes == 0
    narrow = computed(replace(stored.spec, dtype="BF16"), Value(stored))
    assert narrow.raw is None
    assert narrow.load().tolist() == [[0, 1, 2], [3, 4, 5]]
    turned = computed(replace(stored.spec, shape=(3, 2)), Value(stored))
    assert turned.raw is None
    with pytest.raises(PluginError, match="does not have"):
        turned.load()
    assert Value.restore((), {}, {"tensor": stored}) == Value(stored)


def test_a_value_that_must_be_computed_whole_is_computed_whole():
    source = memory("x", 4, 2)
    whole = computed(source.spec, Flip("x"), source)
    result = computed(source.spec, Value(whole))
    assert not whole.row_local
    assert not result.row_local
    assert bits(result.load()) == bits(source.load().flip(0))


def test_an_operation_above_a_whole_one_sees_the_right_rows():
    source, factors = memory("x", 4, 2, dtype=torch.float32), MemoryTensor("f", torch.tensor([1.0, 2.0, 3.0, 4.0]))
    flipped = computed(source.spec, Flip("x"), source)
    result = computed(source.spec, ScaleRows("x", factors), flipped)
    expected = source.load().flip(0) * torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert not result.row_local
    assert bits(result.load()) == bits(expected) == bits(chunked(result, 3))


@pytest.mark.parametrize("row_local", [True, False])
@pytest.mark.parametrize("shape", [(3, 2), (5, 2), (4, 3), (8,), (2, 4), (4, 2, 1)])
def test_a_result_of_another_shape_is_refused(shape, row_local):
    result = computed(TensorSpec("x", "F32", (4, 2)), Returns(torch.zeros(shape), row_local))
    with pytest.raises(PluginError, match="another shape") as caught:
        result.load()
    assert caught.value.expected == "[4, 2]"
    assert caught.value.found == str(list(shape))


@pytest.mark.parametrize("row_local", [True, False])
@pytest.mark.parametrize("value", [torch.tensor(2.0), torch.tensor([2.0])])
def test_a_scalar_result_may_have_no_dimension(value, row_local):
    result = computed(TensorSpec("x", "BF16", ()), Returns(value, row_local))
    assert result.load().shape == ()
    assert result.load() == 2


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), ()])
def test_empty_tensors_and_scalars_convert(shape):
    source = MemoryTensor("x", torch.zeros(shape))
    result = computed(TensorSpec("x", "F16", shape), Convert("x"), source)
    assert result.load().shape == shape
    assert result.load().dtype == torch.float16


def test_leaves_are_the_stored_tensors_under_their_stored_names():
    one, two, operand = memory("one", 4, 2), memory("two", 4, 2), memory("factors", 4)
    scaled = computed(one.spec, ScaleRows("one", operand), one)
    renamed = Renamed("new", scaled)
    both = ComputedTensor(one.spec, Convert("new"), (renamed, Renamed("other", two)))
    assert leaves(both) == {"one": one, "two": two}
    assert leaves(Renamed("new", one)) == {"one": one}
    assert leaves(computed(one.spec, Value(operand))) == {}
    assert leaves(computed(one.spec, Value(Renamed("brought", one)))) == {"one": one}


def test_an_operation_without_a_kind_cannot_be_restored():
    with pytest.raises(NotImplementedError, match="Flip"):
        Flip.restore(("x",), {}, {})
    assert Flip("x").operands == {}
    assert Flip("x").parameters == {}


def test_bits_do_not_depend_on_the_chunk_size():
    source, factors = memory("x", 33, 7), memory("factors", 33, seed=2)
    result = computed(source.spec, ScaleRows("x", factors, 1.0), source)
    read = result.open()
    for chunk_bytes in (1, 14, 50, 10_000):
        rows = torch.cat([read(*chunk) for chunk in row_chunks(source.spec, chunk_bytes)])
        assert bits(rows) == bits(result.load())
