"""Checkpoints: specs, JSON files, digests and the errors of what is not there."""

import hashlib
import json
import os
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from regraft.core import jsonio
from regraft.core.cast import cast_patch
from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import InputError
from regraft.core.patch import overlay
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from tests.checkpoints import bits


def checkpoint(config=None, **tensors):
    files = {"config.json": FileRef(data=json.dumps(config or {}).encode())}
    return Checkpoint("m", {name: MemoryTensor(name, value) for name, value in tensors.items()}, files)


def test_specs_and_tensors_are_found_by_name():
    found = checkpoint(b=torch.zeros(2, 3), a=torch.ones(1).half())
    assert list(found.specs.values()) == [TensorSpec("b", "F32", (2, 3)), TensorSpec("a", "F16", (1,))]
    assert bits(found.load("a")) == bits(torch.ones(1).half())
    assert found.raw("a") is None


def test_a_missing_tensor_is_named():
    with pytest.raises(InputError, match="no such tensor") as caught:
        checkpoint(a=torch.ones(1)).load("b")
    assert caught.value.where == "m: b"
    assert caught.value.remedy


def test_json_files_are_read_and_may_be_missing():
    found = checkpoint({"hidden_size": 8})
    assert found.config == {"hidden_size": 8}
    assert found.generation_config == {}
    broken = replace(found, files={"config.json": FileRef(data=b"[]")})
    with pytest.raises(InputError, match="not a JSON object") as caught:
        broken.config  # noqa: B018
    assert caught.value.where == "m: config.json"


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32}, 32),
        ({"text_config": {"max_position_embeddings": 16}, "max_position_embeddings": 64}, 16),
        ({"text_config": "none", "max_position_embeddings": 64}, 64),
        ({"max_position_embeddings": "64"}, None),
        ({}, None),
    ],
)
def test_the_window_is_that_of_the_language_model(config, window):
    assert checkpoint(config).window == window


def test_a_large_json_file_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, jsonio.MAX_JSON_BYTES + 1)
    monkeypatch.setattr(FileRef, "read", lambda file: pytest.fail("it is read"))
    with pytest.raises(InputError, match="too large"):
        Checkpoint("m", {}, {"config.json": FileRef(path)}).config  # noqa: B018


def test_a_checkpoint_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        checkpoint().label = "other"


def test_a_file_is_on_disk_or_in_memory(tmp_path):
    (tmp_path / "x").write_bytes(b"content")
    for file in (FileRef(tmp_path / "x"), FileRef(data=b"content")):
        assert file.read() == b"content"
        assert file.nbytes == 7
        assert file.sha256() == hashlib.sha256(b"content").hexdigest()


@pytest.mark.parametrize("use", [FileRef.read, FileRef.sha256, lambda file: file.nbytes])
def test_a_file_that_has_gone_is_an_input_error(tmp_path, use):
    with pytest.raises(InputError, match="cannot be read: No such file") as caught:
        use(FileRef(tmp_path / "gone"))
    assert "gone" in caught.value.where


def test_the_digest_depends_on_specs_and_files_and_on_nothing_else(tmp_path):
    base = checkpoint({"a": 1}, x=torch.zeros(2), y=torch.zeros(3))
    assert base.digest == checkpoint({"a": 1}, x=torch.ones(2), y=torch.zeros(3)).digest
    assert base.digest == replace(base, label="other").digest
    (tmp_path / "config.json").write_bytes(base.files["config.json"].read())
    assert base.digest == replace(base, files={"config.json": FileRef(tmp_path / "config.json")}).digest
    others = [
        checkpoint({"a": 2}, x=torch.zeros(2), y=torch.zeros(3)),
        checkpoint({"a": 1}, x=torch.zeros(2), y=torch.zeros(4)),
        checkpoint({"a": 1}, x=torch.zeros(2), z=torch.zeros(3)),
        checkpoint({"a": 1}, x=torch.zeros(2).half(), y=torch.zeros(3)),
        replace(base, files={**base.files, "x": FileRef(data=b"")}),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cast_changes_floats_and_says_so_in_the_config(dtype):
    config = {"torch_dtype": "float64", "text_config": {"dtype": "float64", "a": 1}, "quantization_config": {"a": 1}}
    values = {
        "f64": torch.randn(3).double(),
        "f32": torch.randn(3),
        "ids": torch.arange(3),
        "mask": torch.tensor([True]),
    }
    below = checkpoint(config, **values)
    above = overlay(below, cast_patch(below, dtype), by="cast")
    for name, value in values.items():
        expected = value.to(getattr(torch, dtype)) if value.is_floating_point() else value
        assert bits(above.load(name)) == bits(expected)
    assert above.config == {**config, "torch_dtype": dtype, "text_config": {"dtype": dtype, "a": 1}}


def test_a_cast_to_the_same_dtype_changes_nothing():
    below = checkpoint({"dtype": "float32"}, x=torch.ones(2))
    patch = cast_patch(below, "float32")
    assert not patch.edits
    assert overlay(below, patch, by="cast").files["config.json"] is below.files["config.json"]


def test_a_cast_names_the_dtype_where_the_config_is_silent():
    below = checkpoint({}, x=torch.ones(2))
    assert overlay(below, cast_patch(below, "float16"), by="cast").config == {"dtype": "float16"}
