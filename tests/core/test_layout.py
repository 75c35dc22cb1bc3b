"""Which tensor goes into which file, to the byte."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from regraft.core.checkpoint import Checkpoint
from regraft.core.header import parse_header
from regraft.core.layout import METADATA, lay_out, specs_of
from regraft.core.operations import Convert
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.sources.folder import INDEX, SINGLE, open_folder
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor, PromisedTensor
from tests.checkpoints import write_checkpoint

ROOM = 1 << 20


def promised(sizes, shards=None):
    tensors = {
        f"t{number}": PromisedTensor(TensorSpec(f"t{number}", "U8", (size,))) for number, size in enumerate(sizes)
    }
    return Checkpoint("m", tensors, {}, shards or {})


def groups(layout):
    return [[tensor.spec.name for tensor in shard.tensors] for shard in layout.shards]


@pytest.fixture
def sharded(tmp_path):
    tensors = {f"t{number}": torch.full((1000,), number, dtype=torch.uint8) for number in range(6)}
    return open_folder(write_checkpoint(tmp_path / "m", tensors, shards=3), label="m")


@given(sizes=st.lists(st.integers(0, 500), max_size=20), shard_bytes=st.integers(1, 2000))
def test_tensors_are_packed_in_order_up_to_the_bound(sizes, shard_bytes):
    layout = lay_out(promised(sizes), shard_bytes)
    assert [name for group in groups(layout) for name in group] == [f"t{number}" for number in range(len(sizes))]
    for shard in layout.shards:
        assert shard.nbytes <= shard_bytes or len(shard.tensors) <= 1
    for shard, following in pairwise(layout.shards):
        larger = replace(shard, tensors=(*shard.tensors, following.tensors[0]))
        assert larger.nbytes + 8 > shard_bytes


@given(sizes=st.lists(st.integers(0, 50), max_size=12), shard_bytes=st.integers(1, 1000))
def test_headers_offsets_and_sizes_agree(tmp_path_factory, sizes, shard_bytes):
    layout = lay_out(promised(sizes), shard_bytes)
    for shard in layout.shards:
        header = parse_header(tmp_path_factory.getbasetemp() / shard.name, shard.header[8:], shard.nbytes)
        assert dict(header.metadata) == METADATA
        assert {tensor.spec.name: offset for tensor, offset in shard.offsets()} == {
            name: entry.offset for name, entry in header.entries.items()
        }
        assert layout.files[shard.name] == shard.nbytes
    assert specs_of(layout) == dict(promised(sizes).specs)


def test_one_file_needs_no_index():
    layout = lay_out(promised([3, 4]), ROOM)
    assert [shard.name for shard in layout.shards] == [SINGLE]
    assert layout.index is None
    assert list(layout.files) == [SINGLE]


def test_several_files_are_numbered_and_indexed():
    layout = lay_out(promised([8, 8, 8]), 150)
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    assert [shard.name for shard in layout.shards] == names
    index = json.loads(layout.index)
    assert index["metadata"]["total_size"] == 24
    assert index["weight_map"] == dict(zip(["t0", "t1", "t2"], names, strict=True))
    assert layout.files[INDEX] == len(layout.index)


def test_the_index_is_sorted_by_name():
    tensors = {name: PromisedTensor(TensorSpec(name, "U8", (8,))) for name in "cab"}
    assert list(json.loads(lay_out(Checkpoint("m", tensors, {}), 8).index)["weight_map"]) == ["a", "b", "c"]


def test_untouched_shards_of_the_base_are_kept_whole(sharded):
    layout = lay_out(sharded, ROOM)
    assert groups(layout) == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
    assert [shard.source.name for shard in layout.shards] == [shard.name for shard in layout.shards]
    assert all(shard.nbytes == shard.source.stat().st_size for shard in layout.shards)


def test_a_changed_shard_has_no_source_and_the_others_keep_theirs(sharded):
    patch = Patch(edits={"t2": Edit(TensorSpec("t2", "F32", (1000,)), Convert("t2"))})
    layout = lay_out(overlay(sharded, patch, by="s"), ROOM)
    assert groups(layout) == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
    assert [shard.source is None for shard in layout.shards] == [False, True, False]


def test_removal_and_rename_make_a_new_file(sharded):
    layout = lay_out(overlay(sharded, Patch(removals=frozenset({"t1"}), renames={"z": "t2"}), by="s"), ROOM)
    assert groups(layout) == [["t0"], ["z", "t3"], ["t4", "t5"]]
    assert [shard.source is None for shard in layout.shards] == [True, True, False]


def test_a_shard_that_loses_all_its_tensors_goes(sharded):
    layout = lay_out(overlay(sharded, Patch(removals=frozenset({"t2", "t3"})), by="s"), ROOM)
    assert groups(layout) == [["t0", "t1"], ["t4", "t5"]]
    assert [shard.name for shard in layout.shards] == [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


def test_added_tensors_go_to_the_last_shard(sharded):
    added = Patch(edits={"new": Edit(TensorSpec("new", "U8", (1000,)), Convert("t0"))})
    assert groups(lay_out(overlay(sharded, added, by="s"), ROOM))[-1] == ["t4", "t5", "new"]


def test_shards_that_no_longer_fit_are_packed_anew(sharded):
    largest = max(shard.nbytes for shard in lay_out(sharded, ROOM).shards)
    assert groups(lay_out(sharded, largest)) == [["t0", "t1"], ["t2", "t3"], ["t4", "t5"]]
    assert groups(lay_out(sharded, largest - 1)) == [[f"t{number}"] for number in range(6)]
    wide = Patch(edits={"t0": Edit(TensorSpec("t0", "F32", (1000,)), Convert("t0"))})
    assert groups(lay_out(overlay(sharded, wide, by="s"), 4500)) == [["t0"], ["t1", "t2", "t3", "t4"], ["t5"]]


def test_a_single_large_tensor_of_the_base_keeps_its_shard(tmp_path):
    sizes = {"big": 100, "small": 4, "tiny": 2}
    tensors = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}
    base = open_folder(write_checkpoint(tmp_path, tensors, shards=3), label="m")
    layout = lay_out(base, 8)
    assert groups(layout) == [["big"], ["small"], ["tiny"]]
    assert all(shard.source for shard in layout.shards)


def test_nothing_makes_one_empty_file(sharded):
    for empty in (promised([]), overlay(sharded, Patch(removals=frozenset(sharded.tensors)), by="s")):
        layout = lay_out(empty, 10)
        assert groups(layout) == [[]]
        assert layout.shards[0].name == SINGLE
        assert layout.shards[0].source is None


def test_a_tensor_in_memory_has_no_source():
    layout = lay_out(Checkpoint("m", {"x": MemoryTensor("x", torch.zeros(2))}, {}), 100)
    assert layout.shards[0].source is None
