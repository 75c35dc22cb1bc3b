"""`regraft verify` against a lock file: every kind of change in the folder is found, and a damaged lock is refused."""

import json
import shutil
from pathlib import Path

import pytest

from regraft.core.errors import InputError
from regraft.core.verify.folder import verify_folder
from tests.checkpoints import file_bytes
from tests.running import ABF, done, write_recipe

LOCK = "regraft.lock.json"
SHARD = "model-00003-of-00006.safetensors"


@pytest.fixture(scope="module")
def output(tmp_path_factory, tiny_folder):
    folder = tmp_path_factory.mktemp("locked")
    recipe = write_recipe(folder / "recipe.toml", tiny_folder("llama"), ABF, path=str(folder / "out"))
    done("apply", recipe)
    return folder / "out"


@pytest.fixture
def copy(output, tmp_path):
    return Path(shutil.copytree(output, tmp_path / "copy"))


def faults(folder):
    return [(finding.message, finding.where.removeprefix(f"{folder}: ")) for finding in verify_folder(folder).faults]


def test_as_written(output):
    report = verify_folder(output)
    assert report.findings == ()
    lock = json.loads((output / LOCK).read_text())["output"]
    assert report.agreeing == len(lock["files"]) + len(lock["tensors"]) == 21 + 6
    assert set(lock["files"]) == {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json",
                                  "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


@pytest.mark.parametrize("position", [-1, -5000])
def test_a_flipped_bit_in_a_weight(copy, position):
    path = copy / SHARD
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    ((message, where),) = faults(copy)
    assert message == "the tensor has changed"
    header = json.loads(bytes(data[8 : 8 + int.from_bytes(data[:8], "little")]))
    assert where in header


def test_another_shard_in_its_place(copy):
    """The same names and shapes, other values."""
    path = copy / SHARD
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:length] + bytes(len(data) - length))
    assert {message for message, _ in faults(copy)} == {"the tensor has changed"}


def test_the_same_bytes_under_another_dtype(copy):
    """Other numbers, and yet the digests of their bytes agree."""
    path = copy / SHARD
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name, facts = next((name, facts) for name, facts in header.items() if facts.get("dtype") == "F32")
    header[name] = {**facts, "dtype": "I32"}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert faults(copy) == [("the tensor has another dtype or shape", name)]
    (found,) = verify_folder(copy).faults
    assert (found.expected, found.found) == ("dtype 'F32'", "dtype 'I32'")


def test_a_changed_side_file(copy):
    (copy / "generation_config.json").write_text("{}")
    assert faults(copy) == [("the file has changed", "generation_config.json")]


def test_a_missing_side_file(copy):
    (copy / "tokenizer_config.json").unlink()
    assert faults(copy) == [("a file is missing", "tokenizer_config.json")]


def test_an_added_tensor(copy):
    path = copy / SHARD
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    header["backdoor.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(rest), len(rest) + 4]}
    path.write_bytes(file_bytes(header, rest + bytes(4)))
    index = copy / "model.safetensors.index.json"
    document = json.loads(index.read_text())
    document["weight_map"]["backdoor.weight"] = SHARD
    index.write_text(json.dumps(document))
    assert ("a tensor is there that the lock file does not name", "backdoor.weight") in faults(copy)
    assert ("the file has changed", "model.safetensors.index.json") in faults(copy)


def test_a_removed_tensor(copy):
    lock = json.loads((copy / LOCK).read_text())
    lock["output"]["tensors"]["gone.weight"] = {"dtype": "F32", "shape": [1], "digest": "xxh3:0"}
    (copy / LOCK).write_text(json.dumps(lock))
    assert faults(copy) == [("a tensor is missing", "gone.weight")]


def test_an_added_file_is_a_note(copy):
    (copy / "notes.txt").write_text("mine")
    (copy / "training_args.bin").write_bytes(b"\x80")
    report = verify_folder(copy)
    assert not report.faults
    (note,) = report.findings
    assert note.message.startswith("2 files are there")
    assert note.found == "notes.txt, training_args.bin"


def test_a_checkpoint_without_a_lock(tiny_folder):
    report = verify_folder(tiny_folder("llama"))
    (note,) = report.findings
    assert (note.fatal, report.agreeing) == (False, 0)
    assert LOCK in note.message


def test_linked_weights_have_no_digest_and_that_is_said(tmp_path, tiny_folder):
    recipe = write_recipe(tmp_path / "recipe.toml", tiny_folder("llama"), ABF, path=str(tmp_path / "out"))
    done("apply", recipe, "--link")
    (note,) = verify_folder(tmp_path / "out").findings
    assert not note.fatal
    assert note.message.startswith("21 tensors are without a digest")


def test_sha256_and_none(tmp_path, tiny_folder):
    base = tiny_folder("llama")
    for digest, agreeing in (("sha256", 27), ("none", 6)):
        out = tmp_path / digest
        done("apply", write_recipe(tmp_path / "recipe.toml", base, ABF, path=str(out), digest=digest))
        report = verify_folder(out)
        assert (report.agreeing, len(report.faults)) == (agreeing, 0)


def test_a_folder_of_links_as_the_hub_s_cache_makes_them(output, tmp_path):
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in output.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert verify_folder(snapshot).findings == ()


def change(**changes):
    """The lock file's `output` with these keys."""

    def apply(lock):
        lock["output"].update(changes)

    return apply


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda lock: lock.pop("output"), "output"),
        (change(files=None), "files"),
        (change(tensors=[]), "tensors"),
        (change(files={"config.json": "abc"}), "config.json"),
        (change(tensors={"model.norm.weight": {"digest": "md5:0"}}), "model.norm.weight"),
        (change(tensors={"model.norm.weight": {"digest": 5}}), "model.norm.weight"),
    ],
)
def test_a_malformed_lock(damage, where, copy):
    lock = json.loads((copy / LOCK).read_text())
    damage(lock)
    (copy / LOCK).write_text(json.dumps(lock))
    with pytest.raises(InputError, match="the lock file is malformed") as caught:
        verify_folder(copy)
    assert caught.value.where == f"{copy / LOCK}: {where}"
    (copy / LOCK).write_text("[")
    with pytest.raises(InputError, match="is not JSON"):
        verify_folder(copy)


def test_a_lock_of_another_version(copy):
    lock = json.loads((copy / LOCK).read_text())
    (copy / LOCK).write_text(json.dumps({**lock, "schema": 9}))
    with pytest.raises(InputError, match="a lock file of another version") as caught:
        verify_folder(copy)
    assert (caught.value.expected, caught.value.found) == ("schema 1", "9")


def test_a_lock_that_names_a_path_outside(copy):
    lock = json.loads((copy / LOCK).read_text())
    lock["output"]["files"]["../../etc/passwd"] = {"sha256": "0"}
    (copy / LOCK).write_text(json.dumps(lock))
    assert faults(copy) == [("the lock file names a path outside the folder", "../../etc/passwd")]
