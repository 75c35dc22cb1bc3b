"""Comparing checkpoints: which tensors differ and by how much, and how the files differ."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.diff import Difference, TensorChange, compare_checkpoints
from regraft.core.errors import InputError
from regraft.core.operations import Convert
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.sources.folder import SINGLE, open_folder
from regraft.core.tensors import MemoryTensor
from tests.checkpoints import write_checkpoint
from tests.core.writing import Flip


@pytest.fixture(params=["on disk", "in memory"])
def make(request, tmp_path):
    """A checkpoint of these tensors and files, stored or not: the result must not depend on it."""
    count = iter(range(100))

    def build(tensors=None, files=None, config=None):
        folder = write_checkpoint(tmp_path / str(next(count)), tensors or {}, files=files, config=config)
        stored = open_folder(folder, label="m")
        if request.param == "on disk":
            return stored
        return replace(stored, tensors={name: MemoryTensor(name, value) for name, value in (tensors or {}).items()})

    return build


def only(found):
    (change,) = found.tensors
    return change


def test_equal_checkpoints_do_not_differ(make):
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.arange(4),
        "c": torch.tensor([True]),
        "d": torch.zeros(0, 2),
        "e": torch.tensor(1.0),
    }
    found = compare_checkpoints(make(tensors), make(tensors))
    assert not found
    assert found == Difference(equal_tensors=5)


def test_values_are_measured(make):
    before = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    after = torch.tensor([[3.0, 4.0], [0.0, -2.5]])
    change = only(compare_checkpoints(make({"x": before}), make({"x": after})))
    assert change == TensorChange("x", "values", "F32 [2, 2]", "F32 [2, 2]", 2.5, 0.5)


def test_many_rows_are_measured_piece_by_piece(make):
    before = torch.randn(300_000, 3, generator=torch.Generator().manual_seed(0))
    after = before.clone()
    after[[0, 299_999]] += 1.0
    change = only(compare_checkpoints(make({"x": before}), make({"x": after})))
    delta = (after.double() - before.double()).norm() / before.double().norm()
    assert change.max_abs == (after.double() - before.double()).abs().max()
    assert math.isclose(change.relative, delta, rel_tol=1e-9)


def test_another_dtype_is_named_even_if_the_values_are_equal(make):
    values = torch.tensor([1.0, 2.0])
    change = only(compare_checkpoints(make({"x": values}), make({"x": values.half()})))
    assert (change.kind, change.before, change.after) == ("dtype", "F32 [2]", "F16 [2]")
    assert (change.max_abs, change.relative) == (0, 0)


def test_added_removed_and_reshaped_tensors_are_named(make):
    before = make({"gone": torch.zeros(2), "turned": torch.zeros(2, 3), "same": torch.zeros(1)})
    after = make({"turned": torch.zeros(3, 2), "same": torch.zeros(1), "new": torch.zeros(4)})
    found = compare_checkpoints(before, after)
    assert [(change.name, change.kind) for change in found.tensors] == [
        ("gone", "removed"),
        ("turned", "reshaped"),
        ("new", "added"),
    ]
    assert found.equal_tensors == 1
    assert found.tensors[0].after is None
    assert found.tensors[2].before is None
    assert all(change.max_abs is None for change in found.tensors)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64, torch.int8, torch.uint16, torch.bool, torch.complex64])
def test_tensors_that_are_no_floats_are_compared_too(make, dtype):
    before = torch.tensor([0, 1, 1]).to(dtype)
    after = torch.tensor([0, 1, 0]).to(dtype)
    assert not compare_checkpoints(make({"x": before}), make({"x": before}))
    assert only(compare_checkpoints(make({"x": before}), make({"x": after}))).max_abs == 1


def test_integers_that_float64_cannot_tell_apart_differ(make):
    before = torch.tensor([2**60, 5])
    found = compare_checkpoints(make({"x": before}), make({"x": before + torch.tensor([1, 0])}))
    assert only(found).kind == "values"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_floats_are_compared(make, dtype):
    before, after = torch.tensor([1.0, 2.0]).to(dtype), torch.tensor([1.0, 4.0]).to(dtype)
    assert not compare_checkpoints(make({"x": before}), make({"x": before}))
    assert only(compare_checkpoints(make({"x": before}), make({"x": after}))).max_abs == 2


def test_signs_of_zero_are_no_difference(make):
    assert not compare_checkpoints(make({"x": torch.tensor([0.0])}), make({"x": torch.tensor([-0.0])}))


def test_nan_makes_the_distance_nan(make):
    before, after = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, float("nan"), 5.0])
    change = only(compare_checkpoints(make({"x": before}), make({"x": after})))
    assert math.isnan(change.max_abs)


def test_a_difference_from_zero_is_infinite_in_relation(make):
    change = only(compare_checkpoints(make({"x": torch.zeros(2)}), make({"x": torch.ones(2)})))
    assert change.relative == math.inf


def test_an_overlay_is_compared_before_it_is_written(make):
    below = make({"x": torch.tensor([[1.0], [3.0]])})
    flipped = overlay(below, Patch(edits={"x": Edit(below.specs["x"], Flip("x"))}), by="s")
    assert only(compare_checkpoints(below, flipped)).max_abs == 2
    again = overlay(flipped, Patch(edits={"x": Edit(below.specs["x"], Flip("x"))}), by="s")
    assert not compare_checkpoints(below, again)
    cast = overlay(below, Patch(edits={"x": Edit(below.specs["x"], Convert("x"))}), by="s")
    assert not compare_checkpoints(below, cast)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_order_is_that_of_the_tensors(make, threads):
    names = [f"t{number}" for number in range(20)]
    before = make({name: torch.zeros(2) for name in names})
    after = make({name: torch.ones(2) for name in names})
    found = compare_checkpoints(before, after, threads=threads)
    assert [change.name for change in found.tensors] == list(before.tensors)


def test_files_are_compared_key_by_key_or_byte_by_byte(make):
    before = {
        "tokenizer.json": '{"a": 1}', "sub/x.json": '{"a": 1}', "list.json": "[1]", "notes.txt": "a", "same.txt": "s",
        "generation_config.json": '{"x": 1, "y": {"z": 2}}', "spaces.json": '{"a":1}', "gone.txt": "g",
    }  # fmt: skip
    after = {
        "tokenizer.json": '{"a": 2}', "sub/x.json": '{"a": 2}', "list.json": "[2]", "notes.txt": "b", "same.txt": "s",
        "generation_config.json": '{"x": 1.0, "y": {}}', "spaces.json": '{ "a" : 1 }', "new.txt": "n",
    }  # fmt: skip
    found = compare_checkpoints(make(files=before, config={"a": 1, "b": 2}), make(files=after, config={"a": 1, "c": 3}))
    assert found.json == {"config.json": {"b": None, "c": 3}, "generation_config.json": {"x": 1.0, "y": {"z": None}}}
    assert found.files == {
        "gone.txt": "removed",
        "list.json": "changed",
        "new.txt": "added",
        "notes.txt": "changed",
        "sub/x.json": "changed",
        "tokenizer.json": "changed",
    }
    assert found


def test_files_may_be_left_out(make):
    before, after = make(files={"README.md": "a"}), make(files={"README.md": "b"})
    assert compare_checkpoints(before, after)
    assert not compare_checkpoints(before, after, ignore=frozenset({"README.md"}))


def test_a_file_that_vanishes_is_an_input_error(tmp_path):
    base = open_folder(write_checkpoint(tmp_path / "a", {"x": torch.ones(2)}), label="a")
    other = open_folder(write_checkpoint(tmp_path / "b", {"x": torch.ones(2)}), label="b")
    (tmp_path / "b" / SINGLE).unlink()
    with pytest.raises(InputError, match="No such file"):
        compare_checkpoints(base, other)


@given(
    values=st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=20)
)
@settings(deadline=None, max_examples=50)
def test_the_distances_are_those_of_their_definition(values):
    before, after = (torch.tensor(column, dtype=torch.float32) for column in zip(*values, strict=True))
    files = {"config.json": FileRef(data=b"{}")}
    one, other = (Checkpoint("m", {"x": MemoryTensor("x", tensor)}, files) for tensor in (before, after))
    found = compare_checkpoints(one, other)
    delta = after.double() - before.double()
    if not delta.any():
        assert not found
        return
    change = only(found)
    assert change.max_abs == delta.abs().max()
    norm = before.double().norm()
    assert math.isclose(change.relative, delta.norm() / norm if norm else math.inf, rel_tol=1e-9)


def test_tensors_that_are_known_to_be_equal_are_not_read(tmp_path):
    one, other = ({"x": torch.full((2,), value), "y": torch.ones(2)} for value in (1.0, 2.0))
    sides = [open_folder(write_checkpoint(tmp_path / name, tensors), label=name)
             for name, tensors in (("a", one), ("b", other))]  # fmt: skip
    assert compare_checkpoints(*sides, known_equal=frozenset({"x"})) == Difference(equal_tensors=2)
    assert only(compare_checkpoints(*sides, known_equal=frozenset({"y"}))).name == "x"
