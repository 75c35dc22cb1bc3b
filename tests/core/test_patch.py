"""The algebra of patches: what an overlay shows, that overlays stack, and what contradicts itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import InputError, PluginError
from regraft.core.layout import lay_out
from regraft.core.operations import Convert, ScaleRows, Value
from regraft.core.patch import Edit, Outline, Patch, Renamed, overlay, promise
from regraft.core.sources.folder import open_folder
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor, WeightFile
from regraft.core.writer import WriteOptions, Writer
from tests.checkpoints import bits, file_bytes, same_bits, write_checkpoint

NAMES = ["a", "b", "c", "d"]
CODES = ["F32", "BF16", "F16"]


@pytest.fixture
def below():
    tensors = {name: MemoryTensor(name, torch.full((3, 2), float(number + 1))) for number, name in enumerate(NAMES)}
    files = {
        "config.json": FileRef(data=b'{"a": 1, "b": {"c": 2}}'),
        "tokenizer.json": FileRef(data=b"{}"),
        "notes.txt": FileRef(data=b"x"),
    }
    return Checkpoint("m", tensors, files, dict.fromkeys(NAMES, "one"), {"old.bin": "a pickle"})


def factors(*values):
    return MemoryTensor("factors", torch.tensor(values))


def scaled(spec, *values, code=None, source=None):
    return Edit(replace(spec, dtype=code or spec.dtype), ScaleRows(source or spec.name, factors(*values)))


def test_an_empty_patch_shows_the_same(below):
    above = overlay(below, Patch(), by="s")
    assert above == below
    assert all(above.tensors[name] is tensor for name, tensor in below.tensors.items())


def test_edits_removals_and_renames_keep_the_order(below):
    spec = below.specs["b"]
    patch = Patch(
        edits={"b": scaled(spec, 1.0, 2.0, 3.0), "new": Edit(TensorSpec("new", "F32", (3, 2)), Convert("a"))},
        removals=frozenset({"c"}),
        renames={"z": "a"},
    )
    above = overlay(below, patch, by="s")
    assert list(above.tensors) == ["z", "b", "d", "new"]
    assert above.load("b").tolist() == [[2, 2], [4, 4], [6, 6]]
    assert bits(above.load("z")) == bits(below.load("a")) == bits(above.load("new"))
    assert above.specs["z"] == TensorSpec("z", "F32", (3, 2))
    assert above.shards == {"z": "one", "b": "one", "d": "one"}
    assert list(below.tensors) == NAMES


def test_an_edit_reads_below_and_not_beside(below):
    patch = Patch(
        edits={"a": scaled(below.specs["a"], 9.0, 9.0, 9.0, source="b"), "b": scaled(below.specs["b"], 0.0, 0.0, 0.0)}
    )
    assert overlay(below, patch, by="s").load("a").tolist() == [[18, 18]] * 3


def test_names_can_be_swapped(below):
    above = overlay(below, Patch(renames={"a": "b", "b": "a"}), by="s")
    assert list(above.tensors) == ["b", "a", "c", "d"]
    assert above.load("a").tolist() == [[2, 2]] * 3
    assert above.load("b").tolist() == [[1, 1]] * 3


def test_a_tensor_may_take_the_name_of_a_removed_or_renamed_one(below):
    above = overlay(below, Patch(renames={"b": "a"}, removals=frozenset({"b"})), by="s")
    assert list(above.tensors) == ["b", "c", "d"]
    assert above.load("b").tolist() == [[1, 1]] * 3
    fresh = Edit(TensorSpec("a", "F32", (1,)), Value(MemoryTensor("a", torch.tensor([7.0]))))
    above = overlay(below, Patch(renames={"z": "a"}, edits={"a": fresh}), by="s")
    assert list(above.tensors) == ["z", "b", "c", "d", "a"]
    assert above.load("z").tolist() == [[1, 1]] * 3
    assert above.load("a").tolist() == [7]


def test_a_rename_to_itself_is_nothing(below):
    assert overlay(below, Patch(renames={"a": "a"}), by="s").tensors["a"] is below.tensors["a"]


def test_a_renamed_tensor_is_still_copied_from_its_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes({"x": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, b"abc"))
    stored = WeightFile(path).tensors()["x"]
    renamed = Renamed("y", stored)
    assert renamed.raw == stored.raw
    assert renamed.row_local == stored.row_local
    assert renamed.held_bytes == 0
    assert bits(renamed.load()) == b"abc"


@pytest.mark.parametrize(
    ("patch", "words"),
    [
        (Patch(removals=frozenset({"x"})), "does not exist"),
        (Patch(renames={"y": "x"}), "does not exist"),
        (Patch(renames={"y": "a", "z": "a"}), "two ways"),
        (Patch(renames={"y": "a"}, removals=frozenset({"a"})), "two ways"),
        (Patch(renames={"b": "a"}), "two ways"),
        (Patch(renames={"a": "d"}), "two ways"),
        (Patch(renames={"y": "a"}, edits={"y": Edit(TensorSpec("y", "F32", (3, 2)), Convert("a"))}), "two ways"),
        (Patch(edits={"a": Edit(TensorSpec("a", "F32", (3, 2)), Convert("b"))}, removals=frozenset({"a"})), "two ways"),
        (Patch(edits={"a": Edit(TensorSpec("a", "F32", (3, 2)), Convert("x"))}), "reads a tensor"),
        (Patch(edits={"a": Edit(TensorSpec("b", "F32", (3, 2)), Convert("a"))}), "names another tensor"),
        (Patch(edits={"a": Edit(TensorSpec("a", "F32", (4, 2)), Convert("a"))}), "as many rows"),
        (Patch(edits={"a": Edit(TensorSpec("a", "F32", (2, 3)), Value(factors(1.0)))}), "another shape"),
        (Patch(files={"../x": FileRef(data=b"")}), "outside"),
        (Patch(files={"/x": FileRef(data=b"")}), "outside"),
        (Patch(files={"a/../../x": FileRef(data=b"")}), "outside"),
        (Patch(files={"a//x": FileRef(data=b"")}), "outside"),
        (Patch(files={"..\\x": FileRef(data=b"")}), "outside"),
        (Patch(files={"a\0": FileRef(data=b"")}), "outside"),
        (Patch(files={"": FileRef(data=b"")}), "outside"),
        (Patch(json={"../config.json": {"a": 1}}), "outside"),
        (Patch(files={"model.safetensors": FileRef(data=b"")}), "writes weights"),
        (Patch(files={"model-00001-of-00002.safetensors": FileRef(data=b"")}), "writes weights"),
        (Patch(files={"model.safetensors.index.json": FileRef(data=b"")}), "writes weights"),
        (Patch(json={"config.json": {"a": np.float32(1)}}), "not JSON"),
        (Patch(json={"config.json": {"a": {1, 2}}}), "not JSON"),
    ],
)
def test_a_patch_that_contradicts_itself_or_its_base_is_a_plugin_fault(below, patch, words):
    with pytest.raises(PluginError, match=words) as caught:
        overlay(below, patch, by="honest")
    assert "step honest" in caught.value.where
    assert caught.value.exit_code == 5


def test_a_promise_contradicts_itself_in_the_same_words(below):
    with pytest.raises(PluginError, match="does not exist"):
        promise(below, Outline(removals=frozenset({"x"})), by="s")
    with pytest.raises(PluginError, match="names another tensor"):
        promise(below, Outline(specs={"a": TensorSpec("b", "F32", (1,))}), by="s")


def test_json_files_are_merged_added_and_left_alone(below):
    patch = Patch(
        json={"config.json": {"a": None, "b": {"d": 3}}, "extra.json": {"x": 1}, "tokenizer.json": {}, "none.json": {}}
    )
    above = overlay(below, patch, by="s")
    assert above.config == {"b": {"c": 2, "d": 3}}
    assert above.json("extra.json") == {"x": 1}
    assert above.files["tokenizer.json"] is below.files["tokenizer.json"]
    assert "none.json" not in above.files
    assert below.config == {"a": 1, "b": {"c": 2}}


def test_a_change_of_type_alone_is_a_change(below):
    above = overlay(below, Patch(json={"config.json": {"a": 1.0}}), by="s")
    assert json.dumps(above.config["a"]) == "1.0"


def test_a_json_file_that_is_no_object_cannot_be_merged(below):
    broken = replace(below, files={"list.json": FileRef(data=b"[]")})
    with pytest.raises(InputError, match="not a JSON object"):
        overlay(broken, Patch(json={"list.json": {"a": 1}}), by="s")


def test_files_are_added_replaced_and_dropped(below):
    patch = Patch(
        files={"notes.txt": FileRef(data=b"y"), "sub/new.py": FileRef(data=b"z")},
        dropped={"tokenizer.json": "made anew"},
    )
    above = overlay(below, patch, by="s")
    assert {name: file.read() for name, file in above.files.items() if name != "config.json"} == {
        "notes.txt": b"y",
        "sub/new.py": b"z",
    }
    assert above.left_behind == {"old.bin": "a pickle", "tokenizer.json": "made anew"}


def test_json_is_merged_into_a_file_that_the_same_patch_brings(below):
    patch = Patch(files={"config.json": FileRef(data=b'{"x": 1}')}, json={"config.json": {"y": 2}})
    assert overlay(below, patch, by="s").config == {"x": 1, "y": 2}


def outline_patch(below):
    return Patch(
        edits={
            "a": scaled(below.specs["a"], 1.0, 1.0, 1.0),
            "new": Edit(TensorSpec("new", "BF16", (3, 2)), Convert("b")),
        },
        removals=frozenset({"c"}),
        renames={"z": "d"},
        json={"config.json": {"a": 2}},
        files={"x": FileRef(data=b"12345")},
        dropped={"notes.txt": "stale"},
    )


def test_a_patch_keeps_the_word_of_its_own_outline(below):
    patch = outline_patch(below)
    assert Outline.of(patch).deviations(patch) == []


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"edits": {}}, ["specs"]),
        ({"edits": {"a": Edit(TensorSpec("a", "F16", (3, 2)), Convert("a"))}}, ["specs"]),
        ({"removals": frozenset()}, ["removals"]),
        ({"renames": {}}, ["renames"]),
        ({"json": {"config.json": {"a": 3}}}, ["json"]),
        ({"json": {}}, ["json"]),
        ({"files": {"x": FileRef(data=b"1234")}}, ["files"]),
        ({"files": {"y": FileRef(data=b"12345")}}, ["files"]),
        ({"files": {}}, ["files"]),
        ({"dropped": {}}, ["dropped"]),
        ({"removals": frozenset(), "renames": {}}, ["removals", "renames"]),
        ({"notes": ("x",), "metrics": {"x": 1}}, []),
    ],
)
def test_deviations_are_named(below, change, names):
    patch = outline_patch(below)
    assert Outline.of(patch).deviations(replace(patch, **change)) == names


def edit_of(code, *shape):
    return {"a": Edit(TensorSpec("a", code, shape), Value(MemoryTensor("a", torch.zeros(shape))))}


@pytest.mark.parametrize(
    ("edits", "names"),
    [
        (edit_of("F32", 4, 2), []),
        (edit_of("F32", 3, 2), []),
        (edit_of("F32", 5, 2), ["specs"]),
        (edit_of("F32", 4, 3), ["specs"]),
        (edit_of("F32", 4), ["specs"]),
        (edit_of("F16", 4, 2), ["specs"]),
        ({}, ["specs"]),
    ],
)
def test_an_upper_bound_may_be_kept_and_not_passed(edits, names):
    outline = Outline(specs={"a": TensorSpec("a", "F32", (4, 2))}, files={"x": 10, "y": None}, exact=False)
    files = {"x": FileRef(data=b"12"), "y": FileRef(data=b"1")}
    assert outline.deviations(Patch(edits=edits, files=files)) == names


def test_undecided_keys_may_come_with_any_value_or_not_at_all():
    outline = Outline(json={"c.json": {"a": 1, "b": 2}}, undecided={"c.json": frozenset("bc")})
    for change in ({"a": 1}, {"a": 1, "b": 5}, {"a": 1, "c": {"d": 6}}):
        assert outline.deviations(Patch(json={"c.json": change})) == []
    for change in ({"a": 2}, {"b": 2}, {"a": 1, "e": 1}):
        assert outline.deviations(Patch(json={"c.json": change})) == ["json"]


def test_a_step_that_may_find_nothing_to_do_changes_all_or_nothing(below):
    patch = outline_patch(below)
    nothing = Patch(metrics={"x": 1}, notes=("none found",), reports={"x.json": FileRef(data=b"{}")})
    assert Outline.of(patch).deviations(nothing)
    outline = replace(Outline.of(patch), or_nothing=True)
    assert outline.deviations(nothing) == outline.deviations(patch) == []
    assert outline.deviations(replace(nothing, json=patch.json)) == ["removals", "renames", "dropped", "specs", "files"]


def test_a_file_of_unknown_size_may_have_any_but_must_come():
    outline = Outline(files={"x": None})
    assert outline.deviations(Patch(files={"x": FileRef(data=b"123")})) == []
    assert outline.deviations(Patch()) == ["files"]


def test_a_promise_looks_like_the_overlay_but_has_no_values(below):
    patch = outline_patch(below)
    promised, real = promise(below, Outline.of(patch), by="s"), overlay(below, patch, by="s")
    assert promised.specs == real.specs
    assert list(promised.specs) == list(real.specs)
    assert promised.config == real.config
    assert {name: file.nbytes for name, file in promised.files.items()} == {
        name: file.nbytes for name, file in real.files.items()
    }
    assert promised.shards == real.shards
    assert promised.left_behind == real.left_behind
    with pytest.raises(InputError, match="known only after"):
        promised.load("new")
    assert lay_out(promised, 1 << 30).files == lay_out(real, 1 << 30).files


@st.composite
def patches(draw):
    """A patch of a checkpoint with tensors `NAMES` [3, 2], made once the specs below are known."""
    fate = {name: draw(st.sampled_from(["keep", "scale", "convert", "remove", "rename", "replace"])) for name in NAMES}
    codes = {name: draw(st.sampled_from(CODES)) for name in NAMES}
    numbers = st.floats(-4, 4, width=32)
    scales = {name: draw(st.tuples(numbers, numbers, numbers)) for name in NAMES}
    json = draw(st.dictionaries(st.sampled_from("abc"), st.none() | st.integers(0, 3), max_size=3))
    added = draw(st.booleans())

    def build(checkpoint):
        edits = {}
        for name, spec in checkpoint.specs.items():
            kind, code = fate.get(name, "scale"), codes.get(name, "F32")
            if kind == "scale":
                edits[name] = scaled(spec, *scales.get(name, (1.5, 2.5, 3.5)), code=code)
            elif kind == "convert":
                edits[name] = Edit(replace(spec, dtype=code), Convert(name))
            elif kind == "replace":
                edits[name] = Edit(replace(spec, dtype=code), Value(MemoryTensor("v", torch.full((3, 2), 0.3))))
        present = [name for name in NAMES if name in checkpoint.specs]
        if added:
            edits["new"] = Edit(TensorSpec("new", "F32", (3, 2)), Value(MemoryTensor("v", torch.ones(3, 2))))
        return Patch(
            edits=edits,
            removals=frozenset(name for name in present if fate[name] == "remove"),
            renames={f"{name}.moved": name for name in present if fate[name] == "rename"},
            json={"config.json": json},
        )

    return build


def written(checkpoint, folder):
    folder.mkdir()
    Writer(folder, WriteOptions(threads=1, durable=False)).write(lay_out(checkpoint, 1 << 30))
    for name, file in checkpoint.files.items():
        (folder / name).write_bytes(file.read())
    return open_folder(folder, label="m")


@given(
    first=patches(),
    second=patches(),
    codes=st.lists(st.sampled_from(CODES), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
@settings(deadline=None, max_examples=40)
def test_two_stacked_patches_are_the_first_written_and_the_second_applied(tmp_path_factory, first, second, codes, seed):
    generator = torch.Generator().manual_seed(seed)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    tensors = {
        name: torch.randn(3, 2, generator=generator).to(dtypes[code]) for name, code in zip(NAMES, codes, strict=True)
    }
    root = tmp_path_factory.mktemp("stack")
    base = open_folder(write_checkpoint(root / "base", tensors), label="m")
    one = overlay(base, first(base), by="one")
    stacked = overlay(one, second(one), by="two")
    between = written(one, root / "between")
    assert between.specs == one.specs
    two_passes = overlay(between, second(between), by="two")
    assert stacked.specs == two_passes.specs
    assert stacked.config == two_passes.config
    loaded = {name: stacked.load(name) for name in stacked.tensors}
    assert same_bits(loaded, {name: two_passes.load(name) for name in two_passes.tensors})
    end = written(stacked, root / "end")
    assert same_bits(loaded, {name: end.load(name) for name in end.tensors})


@given(build=patches())
@settings(deadline=None, max_examples=40)
def test_any_patch_keeps_its_outline_and_any_promise_its_specs(build):
    tensors = {name: MemoryTensor(name, torch.ones(3, 2)) for name in NAMES}
    below = Checkpoint("m", tensors, {"config.json": FileRef(data=b'{"a": 1}')})
    patch = build(below)
    assert Outline.of(patch).deviations(patch) == []
    assert promise(below, Outline.of(patch), by="s").specs == overlay(below, patch, by="s").specs
