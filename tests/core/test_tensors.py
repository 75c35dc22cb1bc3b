"""Specs and lazy tensors: bytes as they stand in files, rows of any dtype, and what goes wrong while reading."""

import gc
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from regraft.core.buffers import PAGE_BYTES, phased_empty
from regraft.core.errors import InputError, PluginError
from regraft.core.specs import ITEM_BYTES, TensorSpec, dtype_code, spec_of, torch_dtype
from regraft.core.tensors import MemoryTensor, PromisedTensor, WeightFile, check_rows, row_chunks
from tests.checkpoints import bits, file_bytes, same_bits
from tests.helpers import descriptors

CODES = sorted(ITEM_BYTES)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def random_tensor(code, shape, seed=0):
    """Any bits at all, NaN payloads included; booleans stay 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    spec = TensorSpec("x", code, shape)
    data = torch.randint(0, 2 if code == "BOOL" else 256, (spec.nbytes,), dtype=torch.uint8, generator=generator)
    return data.view(torch_dtype(code)).reshape(shape)


@pytest.mark.parametrize("code", CODES)
def test_codes_and_torch_dtypes_correspond(code):
    dtype = torch_dtype(code)
    assert dtype_code(dtype) == code
    assert dtype.itemsize == ITEM_BYTES[code]


def test_a_dtype_that_safetensors_lacks_is_refused():
    with pytest.raises(InputError, match="no such dtype"):
        spec_of("x", torch.zeros(2, dtype=torch.complex128))


def test_a_dtype_that_this_torch_lacks_is_refused(monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu")
    with pytest.raises(InputError, match="this torch has no dtype for F8_E8M0"):
        torch_dtype("F8_E8M0")


@pytest.mark.parametrize(
    ("shape", "numel", "rows", "row_bytes"),
    [((), 1, 1, 2), ((3,), 3, 3, 2), ((3, 4), 12, 3, 8), ((0, 4), 0, 0, 0), ((3, 0), 0, 3, 0)],
)
def test_the_sizes_of_a_spec(shape, numel, rows, row_bytes):
    spec = TensorSpec("x", "BF16", shape)
    assert (spec.numel, spec.nbytes, spec.rows, spec.row_bytes) == (numel, 2 * numel, rows, row_bytes)
    assert str(spec) == f"x BF16 {list(shape)}"


@given(shape=SHAPES, chunk_bytes=st.integers(1, 100))
def test_chunks_cover_all_rows_once(shape, chunk_bytes):
    spec = TensorSpec("x", "F32", shape)
    chunks = list(row_chunks(spec, chunk_bytes))
    assert [row for start, stop in chunks for row in range(start, stop)] == list(range(spec.rows))
    assert all(stop - start == 1 or (stop - start) * spec.row_bytes <= chunk_bytes for start, stop in chunks)


@given(contents=st.lists(st.tuples(st.sampled_from(CODES), SHAPES), max_size=6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_tensors_are_those_that_the_reference_wrote(tmp_path_factory, contents, seed):
    expected = {f"t{number}": random_tensor(*item, seed) for number, item in enumerate(contents)}
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_file(expected, path)
    tensors = WeightFile(path).tensors()
    assert same_bits({name: tensor.load() for name, tensor in tensors.items()}, expected)
    for name, tensor in tensors.items():
        assert tensor.spec == spec_of(name, expected[name])
        raw = tensor.raw
        assert path.read_bytes()[raw.offset : raw.offset + raw.nbytes] == bits(expected[name])


@pytest.mark.parametrize("code", ["U8", "BF16", "F64"])
def test_rows_are_slices_of_the_whole(tmp_path, code):
    expected = random_tensor(code, (7, 3, 2))
    save_file({"x": expected}, tmp_path / "x.safetensors")
    for tensor in (WeightFile(tmp_path / "x.safetensors").tensors()["x"], MemoryTensor("x", expected)):
        read = tensor.open()
        for start, stop in [(0, 7), (0, 0), (2, 5), (6, 7)]:
            assert bits(read(start, stop)) == bits(expected[start:stop])
            assert read(start, stop).shape == (stop - start, 3, 2)


@pytest.mark.parametrize("rows", [(-1, 2), (2, 1), (0, 8), (8, 8)])
def test_rows_of_the_tensor_behind_are_never_read(tmp_path, rows):
    save_file({"x": torch.ones(7, 2), "y": torch.zeros(7, 2)}, tmp_path / "x.safetensors")
    read = WeightFile(tmp_path / "x.safetensors").tensors()["x"].open()
    with pytest.raises(PluginError, match="does not have"):
        read(*rows)


def test_a_tensor_at_an_odd_offset_is_read(tmp_path):
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    data = b"abc" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(header, data))
    assert WeightFile(path).tensors()["x"].load().tolist() == [1.5, -2.0]


@given(nbytes=st.integers(0, 5000), offset=st.integers(0, 1 << 40))
@settings(max_examples=50)
def test_a_buffer_is_in_phase_with_its_place_in_the_file(nbytes, offset):
    buffer = phased_empty(nbytes, offset)
    assert len(buffer) == nbytes
    wanted = offset % PAGE_BYTES if offset % 8 == 0 else 0
    assert nbytes == 0 or buffer.data_ptr() % PAGE_BYTES == wanted


def test_a_memory_tensor_needs_not_be_contiguous():
    tensor = torch.arange(6.0).reshape(2, 3).T
    lazy = MemoryTensor("x", tensor)
    assert torch.equal(lazy.load(), tensor)
    assert torch.equal(lazy.open()(1, 3), tensor[1:3])
    assert lazy.raw is None
    assert lazy.held_bytes == 24
    assert lazy.row_local


def test_a_memory_tensor_carries_no_gradient():
    assert not MemoryTensor("x", torch.ones(2, requires_grad=True)).load().requires_grad


def test_a_promise_has_no_values():
    promised = PromisedTensor(TensorSpec("x", "F32", (2,)))
    assert promised.raw is None
    with pytest.raises(InputError, match="known only after the step"):
        promised.open()


def test_a_file_that_shrinks_while_it_is_read_is_an_input_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(100)}, path)
    tensor = WeightFile(path).tensors()["x"]
    os.truncate(path, path.stat().st_size - 40)
    with pytest.raises(InputError, match="ended while it was read") as caught:
        tensor.load()
    assert "x.safetensors: x" in caught.value.where
    assert caught.value.expected.startswith("400 bytes")
    assert caught.value.found == "360 bytes"


def test_a_disk_that_fails_is_an_input_error(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4)}, path)
    tensor = WeightFile(path).tensors()["x"]

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(InputError, match="Input/output error"):
        tensor.load()


def test_a_file_that_vanishes_is_an_input_error(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4)}, path)

    def vanish(path, flags):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "open", vanish)
    with pytest.raises(InputError, match="No such file"):
        WeightFile(path)


def test_a_weight_file_closes_its_descriptor(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(4)}, path)
    file = WeightFile(path)
    tensors = file.tensors()
    assert str(path) in descriptors()
    del file, tensors
    gc.collect()
    assert str(path) not in descriptors()


@pytest.mark.parametrize(("shape", "rows"), [((2, 3), (3, 3)), ((2, 3), (2, 4)), ((2, 3), (6,)), ((), (2,))])
def test_rows_of_another_shape_are_refused(shape, rows):
    spec = TensorSpec("x", "F32", shape)
    with pytest.raises(PluginError, match="another shape") as caught:
        check_rows(spec, torch.zeros(rows), spec.rows)
    assert caught.value.where == "x"


def test_a_scalar_is_one_row():
    assert check_rows(TensorSpec("x", "F32", ()), torch.tensor(1.0), 1).shape == (1,)
