"""Checkpoints in folders and single files: what is read, what is carried, and what is refused with which words."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from regraft.core.errors import InputError, PluginError
from regraft.core.header import read_header
from regraft.core.sources import open_checkpoint
from regraft.core.sources.folder import open_folder
from tests.checkpoints import INDEX, SINGLE, entry, file_bytes, same_bits, write_checkpoint
from tests.core.malformed import GOOD, ONE, TWO, Case, file_cases, folder_cases

SMALL_BYTES = 8 << 20
"""Room for the JSON of a header of 600 kB, and not for what a lying header asks for."""


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(12, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator).bfloat16(),
        "mask": torch.tensor([True, False, True]),
        "steps": torch.tensor(7),
    }


@pytest.mark.parametrize("case", [*file_cases(), *folder_cases()], ids=lambda case: case.name)
def test_malformed_input_is_refused(case: Case, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    case.write(folder)
    monkeypatch.setattr(os, "preadv", lambda *arguments: pytest.fail("a weight is read before all headers are valid"))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=case.words) as caught:
            open_checkpoint(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    error = caught.value
    assert case.file in str(error)
    assert error.expected or error.found or error.remedy
    assert error.exit_code == 3
    assert peak < SMALL_BYTES
    assert len(str(error)) < 2000
    assert str(error).replace("\n", "").isprintable()


def test_the_corpus_is_large_and_its_names_differ():
    names = [case.name for case in [*file_cases(), *folder_cases()]]
    assert len(names) == len(set(names)) >= 40


def test_what_the_malformed_files_are_made_of_is_valid(tmp_path):
    path = tmp_path / SINGLE
    path.write_bytes(file_bytes(GOOD, bytes(32)))
    assert list(read_header(path).entries) == ["a", "b"]


@given(
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 400),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused_or_read_as_the_reference_reads_it(tmp_path, damage, cut):
    content = bytearray(file_bytes({"__metadata__": {"format": "pt"}, **GOOD}, bytes(range(32))))
    for place, value in damage:
        content[place % len(content)] = value
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content[:cut])
    try:
        found = {name: (item.spec.dtype, item.spec.shape) for name, item in read_header(path).entries.items()}
    except InputError:
        return
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        assert found == {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


STRICTER = {
    "metadata with a number",
    "a tensor twice",
    "a key of a tensor twice",
    "an entry with another key",
    "an entry is a list",
}
"""What the reference implementation lets pass."""


@pytest.mark.parametrize(
    "case", [case for case in file_cases() if case.name not in STRICTER], ids=lambda case: case.name
)
def test_the_reference_refuses_them_too(case: Case, tmp_path):
    case.write(tmp_path)
    with pytest.raises((SafetensorError, OSError)), safe_open(tmp_path / SINGLE, "pt"):
        pass


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_tensors_are_those_that_the_reference_reads(tmp_path, shards):
    expected = tensors()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", expected, shards=shards))
    assert same_bits({name: checkpoint.load(name) for name in checkpoint.tensors}, expected)
    assert checkpoint.label == str(tmp_path / "m")
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.origin == {"source": "folder"}
    assert len(set(checkpoint.shards.values())) == shards


def test_specs_come_in_the_order_of_the_bytes(tmp_path):
    folder = write_checkpoint(tmp_path, {})
    header = {"late": entry("U8", [2], 2, 4), "early": entry("U8", [2], 0, 2)}
    (folder / SINGLE).write_bytes(file_bytes(header, b"abcd"))
    checkpoint = open_folder(folder, label="m")
    assert list(checkpoint.specs) == ["early", "late"]
    assert checkpoint.load("late").tolist() == [99, 100]


def test_a_single_file_reads_the_config_beside_it(tmp_path):
    folder = write_checkpoint(tmp_path, tensors())
    (folder / SINGLE).rename(folder / "weights.safetensors")
    checkpoint = open_checkpoint("weights.safetensors", folder=folder)
    assert same_bits({name: checkpoint.load(name) for name in checkpoint.tensors}, tensors())
    assert set(checkpoint.files) == {"config.json"}


def test_a_single_file_without_config_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(file_bytes(GOOD, bytes(32)))
    with pytest.raises(InputError, match=r"no config\.json beside") as caught:
        open_checkpoint(path)
    assert "weights.safetensors" in str(caught.value)


def test_a_shard_is_no_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path, tensors(), shards=2)
    with pytest.raises(InputError, match="one shard") as caught:
        open_checkpoint(folder / ONE)
    assert str(folder) in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "words"), [("model.bin", "pickle"), ("model.pt", "pickle"), ("model.txt", "is not a checkpoint")]
)
def test_another_kind_of_file_is_refused_by_name(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize("model", ["no/such/folder", "", "a\0b", "~nobody-of-that-name/model"])
def test_what_does_not_exist_is_refused(tmp_path, model):
    with pytest.raises(InputError) as caught:
        open_checkpoint(model, folder=tmp_path)
    assert caught.value.remedy
    assert "\0" not in str(caught.value)


def test_everything_but_weights_is_carried(tmp_path):
    files = {
        "tokenizer.json": "{}", "chat_template.jinja": "x", "modeling_own.py": "x", "LICENSE": "x",
        "templates/tool.jinja": "x", ".gitattributes": "x",
    }  # fmt: skip
    dropped = {
        "pytorch_model.bin": "x", "old.safetensors": "x", "pytorch_model.bin.index.json": "{}",
        "regraft.lock.json": "{}", "onnx/model.onnx": "x", ".git/config": "x", "__pycache__/x.pyc": "x",
    }  # fmt: skip
    folder = write_checkpoint(tmp_path / "m", tensors(), shards=2, files=files | dropped)
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "broken").symlink_to(tmp_path / "nothing")
    (folder / "linked_file").symlink_to(folder / "LICENSE")
    checkpoint = open_folder(folder, label="m")
    assert set(checkpoint.files) == {"config.json", "linked_file", *files}
    left = {name for name in dropped if "/" not in name} | {
        "onnx/model.onnx",
        ".git",
        "__pycache__",
        "linked",
        "broken",
    }
    assert set(checkpoint.left_behind) == left
    assert all(checkpoint.left_behind.values())


def test_the_folder_of_a_runtime_is_carried_whole_but_for_pickles(tmp_path):
    own = {f"own/{name}": "x" for name in ("policy.json", "runtime.py", "rows.safetensors", "index.faiss")}
    half = {"half/policy.json": "x", "half/rows.safetensors": "x", "own/rows.bin": "x", "policy.json": "x"}
    checkpoint = open_folder(write_checkpoint(tmp_path, tensors(), files=own | half), label="m")
    assert set(checkpoint.files) == {"config.json", "policy.json", "half/policy.json", *own}
    assert set(checkpoint.left_behind) == {"half/rows.safetensors", "own/rows.bin"}


def test_the_folder_of_a_part_that_a_step_left_is_carried_whole_but_for_pickles(tmp_path):
    part = {"part/config.json": '{"format": "regraft-part"}', "part/model.safetensors": "x"}
    others = {
        "other/config.json": '{"format": "of others"}',
        "broken/config.json": "{",
        "listed/config.json": '{"format": ["regraft-part"]}',
    }
    weights = {name.replace("config.json", "model.safetensors"): "x" for name in others} | {"part/optimizer.pt": "x"}
    checkpoint = open_folder(write_checkpoint(tmp_path, tensors(), files=part | others | weights), label="m")
    assert set(checkpoint.files) == {"config.json", *part, *others}
    assert set(checkpoint.left_behind) == set(weights)


def test_a_stale_index_beside_a_named_file_is_listed(tmp_path):
    folder = write_checkpoint(tmp_path, tensors())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": TWO}}))
    checkpoint = open_checkpoint(folder / SINGLE)
    assert "index" in checkpoint.left_behind[INDEX]


def test_shards_may_be_links_out_of_the_folder(tmp_path):
    blobs = write_checkpoint(tmp_path / "blobs", tensors(), shards=2)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    checkpoint = open_folder(folder, label="m")
    assert same_bits({name: checkpoint.load(name) for name in checkpoint.tensors}, tensors())


def test_a_folder_that_cannot_be_listed_is_an_input_error(tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path, tensors())

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        open_folder(folder, label="m")


class BrokenSource:
    name = "broken"

    def __init__(self, fails_in):
        self.fails_in = fails_in

    def accepts(self, reference):
        if self.fails_in == "accepts":
            raise KeyError("x")
        return reference.model == "broken:1"

    def open(self, reference):
        raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize("place", ["accepts", "open"])
def test_a_source_that_fails_is_named(place):
    with pytest.raises(PluginError, match="source failed") as caught:
        open_checkpoint("broken:1", extra=[BrokenSource(place)])
    assert "source broken" in str(caught.value)


def test_a_source_of_a_plugin_is_asked_first(tmp_path):
    folder = write_checkpoint(tmp_path, tensors())

    class Mine:
        name = "mine"

        def accepts(self, reference):
            return reference.model == "demo:tiny"

        def open(self, reference):
            return open_folder(folder, label="mine")

    assert open_checkpoint("demo:tiny", extra=[Mine()]).label == "mine"


def test_a_null_quantisation_is_none(tmp_path):
    folder = write_checkpoint(tmp_path, tensors(), config={"model_type": "llama", "quantization_config": None})
    assert same_bits({"mask": open_checkpoint(folder).load("mask")}, {"mask": load_file(folder / SINGLE)["mask"]})
