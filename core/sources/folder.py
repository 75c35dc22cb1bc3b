"""Checkpoints in a folder (one safetensors file or an index of shards), and single `.safetensors` files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from regraft.core.buffers import unreadable
from regraft.core.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint, FileRef
from regraft.core.errors import InputError
from regraft.core.jsonio import brief, read_object
from regraft.core.sources.open import Reference
from regraft.core.tensors import FileTensor, WeightFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LOCK = "regraft.lock.json"
CARD = "README.md"
REPORTS = "regraft"
"""Folder of an output with a folder of reports for each step."""

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
WEIGHT_SUFFIXES = PICKLE_SUFFIXES | {
    ".safetensors",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".ot",
    ".tflite",
}
RUNTIME_MARKS = frozenset({"policy.json", "runtime.py"})
"""Files that a folder inside a checkpoint has when it belongs to a runtime: code for whoever loads the checkpoint, and
what it goes by. All that stands beside them is the runtime's own, tables in safetensors included."""
PART_FORMAT = "regraft-"
"""How `format` begins in the config.json of a folder inside a checkpoint that a step has left there: a part of the
model that stands beside its weights, with weights of its own, such as a generator."""
_NOT_CARRIED_FOLDERS = frozenset({".git", ".cache", "__pycache__"})
_FETCH = "fetch the checkpoint again"


class FolderSource:
    """Accepts folders."""

    name = "folder"

    def accepts(self, reference: Reference) -> bool:
        """Whether the path is a folder."""
        return reference.path.is_dir()

    def open(self, reference: Reference) -> Checkpoint:
        """Open the folder."""
        return open_folder(reference.path, label=reference.model)


class FileSource:
    """Accepts single `.safetensors` files with a config beside them, and refuses pickles by name."""

    name = "file"

    def accepts(self, reference: Reference) -> bool:
        """Whether the path is an existing file."""
        return reference.path.is_file()

    def open(self, reference: Reference) -> Checkpoint:
        """Open the file.

        Raises:
            InputError: it is a pickle, or no safetensors file, or it is a shard of a larger checkpoint.
        """
        path = reference.path
        if path.suffix in PICKLE_SUFFIXES:
            raise _pickle(path)
        if path.suffix != ".safetensors":
            raise InputError(
                "is not a checkpoint",
                where=reference.model,
                expected="a .safetensors or .gguf file, or a folder",
                remedy="name the checkpoint itself",
            )
        index = path.parent / INDEX
        if index.is_file() and path.name in set(_weight_map(index).values()):
            raise InputError(
                "is one shard of a sharded checkpoint", where=reference.model, remedy=f"name its folder: {path.parent}"
            )
        return _assemble(path.parent, reference.model, [WeightFile(path)], {path.name})


def open_folder(folder: Path, *, label: str) -> Checkpoint:
    """Open the checkpoint in `folder`; every header is validated, no weight is read.

    Raises:
        InputError: no config.json, no weights, pickled weights only, an index that lies, a bad header, or no right to
            read the folder.
    """
    try:
        return _open(folder, label)
    except OSError as error:
        raise unreadable(error.filename or folder, error) from None


def _open(folder: Path, label: str) -> Checkpoint:
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise InputError("the folder is an adapter, no model", where=label, expected=f"a folder with {CONFIG}",
                             found=ADAPTER_CONFIG,
                             remedy='name its base model, and merge it with a step use = "lora-merge"')  # fmt: skip
        raise InputError(
            f"the folder has no {CONFIG}",
            where=label,
            expected=f"a checkpoint folder with {CONFIG}",
            remedy="name the folder that holds the model's config and weights",
        )
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file() and single.is_file():
        raise InputError(
            f"the folder holds both {INDEX} and {SINGLE}",
            where=label,
            remedy="two models are mixed up in it: remove the one that is stale",
        )
    if index.is_file():
        files = _shards(folder, index)
        return _assemble(folder, label, files, {INDEX, *(file.path.name for file in files)})
    if single.is_file():
        return _assemble(folder, label, [WeightFile(single)], {SINGLE})
    raise _no_weights(folder, label)


def _shards(folder: Path, index: Path) -> list[WeightFile]:
    weight_map = _weight_map(index)
    files = []
    for name in sorted(set(weight_map.values())):
        if (folder / name).suffix in PICKLE_SUFFIXES:
            raise _pickle(folder / name)
        if not (folder / name).is_file():
            raise InputError(
                "the index names a shard that is missing",
                where=f"{index}: {name}",
                expected=f"the file {name} in the folder",
                remedy="fetch the missing file",
            )
        files.append(WeightFile(folder / name))
    _check_index(index, weight_map, files)
    return files


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(
            "the index has no weight_map",
            where=index,
            expected="an object: tensor name -> file name",
            found=brief(weight_map),
            remedy="fetch the index again",
        )
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and PurePosixPath(name).name == name and not set(name) & {"\\", "\0"}
        if not plain or name in {"", ".", ".."}:
            raise InputError(
                "the index does not name a file of the folder",
                where=f"{index}: {tensor}",
                expected="a plain file name",
                found=brief(name),
                remedy="do not trust this checkpoint: a path could lead outside its folder",
            )
    return weight_map


def _check_index(index: Path, weight_map: Mapping[str, str], files: list[WeightFile]) -> None:
    stored: dict[str, str] = {}
    for file in files:
        for name in file.header.entries:
            if name in stored:
                raise InputError(
                    "two shards hold the same tensor",
                    where=f"{index}: {name}",
                    found=f"{stored[name]} and {file.path.name}",
                    remedy=_FETCH,
                )
            stored[name] = file.path.name
    for name, shard in weight_map.items():
        if stored.get(name) != shard:
            raise InputError(
                "index and shards disagree",
                where=f"{index}: {name}",
                expected=f"the tensor in {shard}",
                found=stored.get(name, "no such tensor in any shard"),
                remedy=_FETCH,
            )
    for name, shard in stored.items():
        if name not in weight_map:
            raise InputError(
                "a shard holds a tensor that the index does not name",
                where=f"{index}: {name}",
                found=f"in {shard}",
                remedy=_FETCH,
            )


def _assemble(folder: Path, label: str, weights: list[WeightFile], own: set[str]) -> Checkpoint:
    tensors: dict[str, FileTensor] = {}
    shards: dict[str, str] = {}
    for file in weights:
        tensors.update(file.tensors())
        shards.update(dict.fromkeys(file.header.entries, file.path.name))
    files, left_behind = side_files(folder, own)
    if CONFIG not in files:
        raise InputError(
            f"there is no {CONFIG} beside the weights",
            where=label,
            expected=f"{folder / CONFIG}",
            remedy="put the model's config beside the file",
        )
    return Checkpoint(label, tensors, files, shards, left_behind, {"source": "folder"})


def side_files(folder: Path, own: set[str]) -> tuple[dict[str, FileRef], dict[str, str]]:
    """The files of `folder` that are carried over, and those left behind with the reason. Everything is carried that is
    neither a weight nor known to be stale in the output; the folders of runtimes and of parts that steps have left are
    carried whole, pickles excepted.

    Args:
        folder: of the checkpoint.
        own: names of the weight files that are read, and of their index.
    """
    files: dict[str, FileRef] = {}
    left_behind: dict[str, str] = {}
    found = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    whole = runtime_folders(found) | _part_folders(found)
    for name, path in found.items():
        if name in own:
            continue
        if path.is_dir():
            left_behind[name] = "a link to a folder" if path.is_symlink() else "belongs to a tool, not to the model"
        elif not path.is_file():
            left_behind[name] = "is not a file, or a link that leads nowhere"
        elif path.suffix in PICKLE_SUFFIXES or (path.suffix in WEIGHT_SUFFIXES and _folder_of(name) not in whole):
            left_behind[name] = "weights in another file or format, not rewritten"
        elif name.endswith(".index.json"):
            left_behind[name] = "index of weights that are not rewritten"
        elif name.startswith(f"{REPORTS}/"):
            left_behind[name] = "reports on how the base was made"
        elif name == LOCK:
            left_behind[name] = "describes the base; the output gets its own"
        else:
            files[name] = FileRef(path)
    return files, left_behind


def runtime_folders(names: Iterable[str]) -> frozenset[str]:
    """The folders that belong to a runtime, by the paths of all files of a checkpoint."""
    beside: dict[str, set[str]] = {}
    for name in names:
        beside.setdefault(_folder_of(name), set()).add(PurePosixPath(name).name)
    return frozenset(folder for folder, files in beside.items() if folder and files >= RUNTIME_MARKS)


def _part_folders(found: Mapping[str, Path]) -> frozenset[str]:
    """The folders that a step has left: see `PART_FORMAT`."""
    configs = [name for name, path in found.items() if name.endswith(f"/{CONFIG}") and path.is_file()]
    return frozenset(_folder_of(name) for name in configs if _says_part(found[name]))


def _says_part(config: Path) -> bool:
    try:
        stated = read_object(config).get("format")
    except InputError:  # somebody else's file, which nothing here depends on
        return False
    return isinstance(stated, str) and stated.startswith(PART_FORMAT)


def _folder_of(name: str) -> str:
    """Of a path in a checkpoint; empty for a file at the top."""
    return "/".join(PurePosixPath(name).parts[:-1])


def _walk(folder: Path) -> Iterator[Path]:
    """Everything below `folder`; of folders only those that are not entered."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and path.name not in _NOT_CARRIED_FOLDERS:
            yield from _walk(path)
        else:
            yield path


def _no_weights(folder: Path, label: str) -> InputError:
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".gguf"))
    if pickles and not others:
        return _pickle(pickles[0])
    remedy = f"name the file itself: {Path(label) / others[0]}" if others else "name the folder that holds the weights"
    return InputError("the folder has no weights", where=label, expected=f"{SINGLE} or {INDEX}", remedy=remedy)


def _pickle(path: Path) -> InputError:
    remedy = "convert it once with a tool you trust: load it in transformers and call save_pretrained"
    return InputError(
        "is a pickle, and regraft never reads pickles: they can run code",
        where=path,
        expected="safetensors or GGUF",
        remedy=remedy,
    )
