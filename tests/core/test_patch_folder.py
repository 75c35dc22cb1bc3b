"""Saved patches: what is applied again gives the same bits, and a folder that lies is refused."""

import errno
import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.checkpoint import FileRef
from regraft.core.errors import InputError, PluginError, ResourceError, UsageError
from regraft.core.low_rank import LowRankDelta
from regraft.core.operations import Convert, ScaleRows, Value
from regraft.core.patch import Edit, Outline, Patch, overlay
from regraft.core.patch_folder import load_patch, save_patch
from regraft.core.sources.folder import open_folder
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from tests.checkpoints import bits, entry, file_bytes, same_bits, write_checkpoint
from tests.core.writing import Flip


def memory(*shape, seed=0, dtype=torch.float32):
    return MemoryTensor("operand", torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


@pytest.fixture
def below(tmp_path):
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(6, 4, generator=generator).bfloat16() for name in "abcdefg"}
    return open_folder(write_checkpoint(tmp_path / "base", tensors, files={"old.txt": "x"}), label="base")


def everything(below):

    def like(name, code="BF16", shape=(6, 4)):
        return TensorSpec(name, code, shape)

    return Patch(
        edits={
            "a": Edit(like("a"), ScaleRows("a", memory(6), 1.0)),
            "b": Edit(like("b", "F16"), Convert("b")),
            "c": Edit(like("c"), LowRankDelta("c", memory(6, 2, seed=1), memory(2, 4, seed=2), 0.5)),
            "d": Edit(like("d"), Flip("d")),
            "new": Edit(like("new", "F32", (3,)), Value(memory(3, seed=3))),
            "scalar": Edit(like("scalar", "F32", ()), Value(memory(seed=4))),
            "empty": Edit(like("empty", "F32", (0, 3)), Value(memory(0, 3))),
        },
        removals=frozenset({"e"}),
        renames={"moved": "f"},
        json={"config.json": {"rope_theta": 5e5, "old": None}, "extra.json": {"ä": [1, {"x": None}]}},
        files={"code/modeling.py": FileRef(data=b"print()\n"), "x.txt": FileRef(data=b"")},
        dropped={"old.txt": "stale"},
        metrics={"loss": 0.25, "heads": [1, 2]},
        notes=("one", "zwei ☃"),
    )


def saved(patch, below, folder):
    save_patch(patch, below, overlay(below, patch, by="s"), folder)
    return load_patch(folder)


def test_a_saved_patch_gives_the_same_checkpoint(below, tmp_path):
    patch = everything(below)
    loaded, reads = saved(patch, below, tmp_path / "p.regraft")
    before, after = overlay(below, patch, by="s"), overlay(below, loaded, by="s")
    assert list(before.tensors) == list(after.tensors)
    assert same_bits(
        {name: before.load(name) for name in before.tensors}, {name: after.load(name) for name in after.tensors}
    )
    assert {name: file.read() for name, file in before.files.items()} == {
        name: file.read() for name, file in after.files.items()
    }
    assert before.left_behind == after.left_behind
    for field in ("removals", "renames", "json", "dropped", "metrics", "notes"):
        assert getattr(loaded, field) == getattr(patch, field)
    assert Outline.of(patch).deviations(loaded) == []
    assert reads == {name: below.specs[name] for name in "abcd"}


def test_formulas_are_saved_as_formulas_and_the_rest_by_value(below, tmp_path):
    loaded, _ = saved(everything(below), below, tmp_path / "p.regraft")
    kinds = {name: type(edit.operation) for name, edit in loaded.edits.items()}
    assert kinds == {
        "a": ScaleRows, "b": Convert, "c": LowRankDelta, "d": Value, "new": Value, "scalar": Value, "empty": Value,
    }  # fmt: skip
    assert bits(loaded.edits["d"].operation.tensor.load()) == bits(below.load("d").flip(0))


def test_a_formula_takes_little_room(tmp_path):
    base = open_folder(write_checkpoint(tmp_path / "m", {"w": torch.randn(256, 256)}), label="m")
    saved(Patch(edits={"w": Edit(base.specs["w"], ScaleRows("w", memory(256)))}), base, tmp_path / "p")
    assert (tmp_path / "p" / "tensors.safetensors").stat().st_size < 2000


def test_operands_stay_on_disk_until_they_are_needed(below, tmp_path, monkeypatch):
    save_patch(everything(below), below, overlay(below, everything(below), by="s"), tmp_path / "p")
    monkeypatch.setattr(os, "preadv", lambda *arguments: pytest.fail("an operand is read"))
    patch, _ = load_patch(tmp_path / "p")
    operand = next(operand for edit in patch.edits.values() for operand in edit.operation.operands.values())
    with pytest.raises(pytest.fail.Exception, match="an operand is read"):
        operand.load()


def test_an_empty_patch_is_saved(below, tmp_path):
    loaded, reads = saved(Patch(), below, tmp_path / "p")
    assert loaded == Patch()
    assert reads == {}


def test_saving_twice_gives_the_same_bytes(below, tmp_path):
    for name in ("one", "two"):
        saved(everything(below), below, tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_a_folder_that_exists_is_not_overwritten(below, tmp_path):
    (tmp_path / "p").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        saved(Patch(), below, tmp_path / "p")


def test_the_remains_of_a_failed_save_are_no_obstacle(below, tmp_path):
    (tmp_path / ".p.partial" / "files").mkdir(parents=True)
    saved(Patch(), below, tmp_path / "p")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "p"]


def test_a_full_disk_leaves_nothing(below, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(ResourceError, match="No space left"):
        saved(everything(below), below, tmp_path / "p")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize("metrics", [{"x": torch.tensor(1.0)}, {"x": {1, 2}}])
def test_metrics_that_are_not_json_are_a_plugin_fault(below, tmp_path, metrics):
    with pytest.raises(PluginError, match="not JSON"):
        saved(Patch(metrics=metrics), below, tmp_path / "p")
    assert not (tmp_path / "p").exists()


class Untrue(MemoryTensor):
    def open(self, device="cpu"):
        read = super().open(device)
        return lambda start, stop: read(start, stop).double()


def test_a_tensor_that_is_not_what_it_says_is_a_plugin_fault(below, tmp_path):
    patch = Patch(edits={"new": Edit(TensorSpec("new", "F32", (3,)), Value(Untrue("operand", torch.ones(3))))})
    with pytest.raises(PluginError, match="otherwise than its spec says"):
        saved(patch, below, tmp_path / "p")
    assert not (tmp_path / "p").exists()


@given(codes=st.lists(st.sampled_from(["F32", "BF16", "F16", "F64"]), min_size=3, max_size=3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_any_dtypes_give_the_same_bits(tmp_path_factory, codes, seed):
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    stored, target, operand = (dtypes[code] for code in codes)
    folder = tmp_path_factory.mktemp("any")
    base = open_folder(write_checkpoint(folder / "m", {"w": memory(5, 3, seed=seed).load().to(stored)}), label="m")
    spec = TensorSpec("w", codes[1], (5, 3))
    for number, operation in enumerate(
        [
            ScaleRows("w", memory(5, seed=seed, dtype=operand), 1.0),
            LowRankDelta("w", memory(5, 2, seed=seed, dtype=operand), memory(2, 3, dtype=operand), 0.3),
            Convert("w"),
            Value(memory(5, 3, seed=seed, dtype=operand)),
            Flip("w"),
        ]
    ):
        patch = Patch(edits={"w": Edit(spec, operation)})
        loaded, _ = saved(patch, base, folder / str(number))
        after = overlay(base, loaded, by="s").load("w")
        assert after.dtype == target
        assert bits(after) == bits(overlay(base, patch, by="s").load("w"))


# Folders that lie


@pytest.fixture
def good(below, tmp_path):
    save_patch(everything(below), below, overlay(below, everything(below), by="s"), tmp_path / "good.regraft")
    return tmp_path / "good.regraft"


def changed(document, path, value):
    """The document with the value at `path` replaced, or removed where it is None."""
    *above, last = path
    place = document
    for key in above:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["schema"], 2, "another version"),
        (["schema"], "1", "another version"),
        (["schema"], None, "another version"),
        (["edits"], None, "malformed"),
        (["edits"], [], "malformed"),
        (["other"], 1, "malformed"),
        (["removals"], "abc", "malformed"),
        (["removals"], [1], "malformed"),
        (["renames"], ["a"], "malformed"),
        (["renames"], {"a": 1}, "malformed"),
        (["json"], [], "malformed"),
        (["json"], {"config.json": 1}, "malformed"),
        (["files"], {"a": 1}, "malformed"),
        (["dropped"], {"a": None}, "malformed"),
        (["metrics"], 1, "malformed"),
        (["notes"], "one", "malformed"),
        (["edits", "a", "dtype"], "F31", "malformed"),
        (["edits", "a", "dtype"], ["F32"], "malformed"),
        (["edits", "a", "shape"], [-6, 4], "malformed"),
        (["edits", "a", "shape"], [6.0, 4], "malformed"),
        (["edits", "a", "shape"], [True, 4], "malformed"),
        (["edits", "a", "shape"], 6, "malformed"),
        (["edits", "a", "operation"], "eval", "malformed"),
        (["edits", "a", "operation"], 1, "malformed"),
        (["edits", "a", "parameters"], {}, "malformed"),
        (["edits", "a", "parameters"], {"offset": "x"}, "malformed"),
        (["edits", "a", "parameters"], {"offset": []}, "malformed"),
        (["edits", "a", "operands"], {}, "malformed"),
        (["edits", "a", "operands"], {"factors": "nowhere"}, "malformed"),
        (["edits", "a", "operands"], {"factors": 1}, "malformed"),
        (["edits", "a", "inputs"], [], "malformed"),
        (["edits", "a", "inputs"], [{"name": "a"}], "malformed"),
        (["edits", "a", "inputs"], ["a"], "malformed"),
        (["edits", "new", "shape"], [4], "malformed"),
        (["edits", "new", "dtype"], None, "malformed"),
        (["files"], ["../../secret"], "outside its folder"),
        (["files"], ["/etc/passwd"], "outside its folder"),
        (["files"], ["a\0b"], "outside its folder"),
        (["files"], ["nothing.txt"], "is missing"),
    ],
)
def test_a_document_that_lies_is_refused(good, path, value, words):
    document = json.loads((good / "patch.json").read_text())
    (good / "patch.json").write_text(json.dumps(changed(document, path, value)))
    with pytest.raises(InputError, match=words) as caught:
        load_patch(good)
    assert "good.regraft" in str(caught.value)
    assert caught.value.found or caught.value.remedy
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("patch.json", b"[]", "not a JSON object"),
        ("patch.json", b"{", "not JSON"),
        ("tensors.safetensors", b"\x80\x04", "too short"),
        ("tensors.safetensors", file_bytes({}), "malformed"),
        ("tensors.safetensors", file_bytes({"x": entry("F32", [1], 0, 8)}, bytes(8)), "disagree"),
    ],
    ids=["list", "cut", "short", "without tensors", "lying header"],
)
def test_a_file_that_lies_is_refused(good, name, content, words):
    (good / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_patch(good)


@pytest.mark.parametrize(
    ("name", "words"), [("patch.json", "not a saved patch"), ("tensors.safetensors", "No such file")]
)
def test_a_part_that_is_missing_is_named(good, name, words):
    (good / name).unlink()
    with pytest.raises(InputError, match=words) as caught:
        load_patch(good)
    assert name in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a saved patch"):
        load_patch(tmp_path / "nothing")


def test_a_saved_patch_that_writes_outside_the_checkpoint_is_stopped_by_the_overlay(good, below):
    document = json.loads((good / "patch.json").read_text())
    document["json"] = {"../config.json": {"a": 1}}
    (good / "patch.json").write_text(json.dumps(document))
    loaded, _ = load_patch(good)
    with pytest.raises(PluginError, match="outside the checkpoint"):
        overlay(below, loaded, by="s")


def test_a_moved_folder_is_loaded_where_it_is(good, below, tmp_path):
    shutil.move(good, tmp_path / "moved")
    loaded, _ = load_patch(tmp_path / "moved")
    above = overlay(below, loaded, by="s")
    assert above.files["code/modeling.py"].read() == b"print()\n"
    assert bits(above.load("b")) == bits(below.load("b").half())
