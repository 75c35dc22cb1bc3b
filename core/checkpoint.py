"""A checkpoint as every step sees it: lazy tensors, files, and where they come from. Immutable."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.core.buffers import unreadable
from regraft.core.errors import InputError
from regraft.core.jsonio import check_size, parse_object
from regraft.core.specs import TensorSpec
from regraft.core.tensors import ByteRange, LazyTensor

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class FileRef:
    """A file that is not a weight: on disk at `path`, or, when a step wrote it, in `data`."""

    path: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            InputError: the file cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise unreadable(self.path, error) from None

    def copy_to(self, target: Path) -> None:
        """Write its bytes to `target`; a file on the disk goes there without passing through memory.

        Raises:
            OSError: it cannot be read, or `target` not written.
        """
        if self.data is not None:
            target.write_bytes(self.data)
        else:
            assert self.path is not None
            shutil.copyfile(self.path, target)

    def sha256(self) -> str:
        """SHA-256 of its bytes, read piece by piece.

        Raises:
            InputError: the file cannot be read.
        """
        if self.data is not None:
            return hashlib.sha256(self.data).hexdigest()
        assert self.path is not None
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(self.path, error) from None

    @property
    def nbytes(self) -> int:
        """Its size.

        Raises:
            InputError: the file has gone.
        """
        if self.data is not None:
            return len(self.data)
        assert self.path is not None
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise unreadable(self.path, error) from None


@dataclass(frozen=True)
class Checkpoint:
    """Tensors and files of one model, seen through whatever steps stand above the base.

    Args:
        label: how messages and provenance name it: what the user wrote, never an absolute path.
        tensors: lazy tensors by name, in the order of the files.
        files: everything that is no weight, by relative path; `config.json` is one of them.
        shards: for each tensor the file name it stands in, a hint for the layout of the output; may be empty.
        left_behind: files of the source that are not carried over, with the reason.
        origin: facts about the source for the lock file: kind, revision.
        notes: what the source did that a user should know.
        packed: a quantised base as it is stored, where `tensors` shows its weights dequantised.
    """

    label: str
    tensors: Mapping[str, LazyTensor]
    files: Mapping[str, FileRef]
    shards: Mapping[str, str] = field(default_factory=dict)
    left_behind: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    packed: Checkpoint | None = field(default=None, repr=False)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Spec of every tensor, in order."""
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The contents of config.json."""
        return self.json(CONFIG)

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The contents of generation_config.json; empty if there is none."""
        return self.json(GENERATION_CONFIG)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of config.json that is about the language model: all of it, or its `text_config`."""
        found = self.config.get("text_config")
        return found if isinstance(found, dict) and found else self.config

    @property
    def window(self) -> int | None:
        """Tokens that the model's positions are meant for; None where config.json does not say."""
        values = (self.text_config.get(key) for key in ("max_position_embeddings", "n_positions"))
        return next((value for value in values if type(value) is int), None)

    def json(self, name: str) -> Mapping[str, Any]:
        """A JSON file of the checkpoint, by relative path; empty if there is none.

        Raises:
            InputError: it is too large, or not a JSON object.
        """
        file, where = self.files.get(name), f"{self.label}: {name}"
        if file is None:
            return {}
        check_size(file.nbytes, where)
        return parse_object(file.read(), where)

    def tensor(self, name: str) -> LazyTensor:
        """The lazy tensor `name`.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.tensors:
            raise InputError(
                "the checkpoint has no such tensor",
                where=f"{self.label}: {name}",
                expected=f"one of its {len(self.tensors)} tensors",
                remedy="list them with `regraft inspect --tensors`",
            )
        return self.tensors[name]

    def load(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The tensor `name` on `device`, in the shape and dtype of its spec.

        Raises:
            InputError: there is none of that name, or its file cannot be read.
        """
        return self.tensor(name).load(device)

    def raw(self, name: str) -> ByteRange | None:
        """Where the bytes of `name` stand on disk, if they stand there as they are."""
        return self.tensor(name).raw

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every spec and every file that is no weight: what a plan depends on. Reads no weight."""
        hasher = hashlib.sha256()
        specs = [[spec.name, spec.dtype, list(spec.shape)] for spec in self.specs.values()]
        hasher.update(json.dumps(specs).encode())
        for name in sorted(self.files):
            hasher.update(json.dumps([name, self.files[name].sha256()]).encode())
        return hasher.hexdigest()
