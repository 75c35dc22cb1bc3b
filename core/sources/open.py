"""One door for every kind of base checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, PluginError, RegraftError


@dataclass(frozen=True)
class Reference:
    """What a recipe says of its base: the model, a revision, and the folder that relative paths start from."""

    model: str
    revision: str | None = None
    folder: Path = Path()

    @property
    def path(self) -> Path:
        """The model read as a path."""
        try:
            return self.folder / Path(self.model).expanduser()
        except RuntimeError:  # the home of a user that there is not
            return self.folder / self.model


class Source(Protocol):
    """A kind of place that checkpoints come from."""

    name: str

    def accepts(self, reference: Reference) -> bool:
        """Whether this source is the one for `reference`; looks at names and at the disk, not at the network."""
        ...

    def open(self, reference: Reference) -> Checkpoint:
        """Open it, headers validated.

        Raises:
            InputError: it cannot be read or is not valid.
        """
        ...


def built_in_sources() -> list[Source]:
    """Our own sources, in the order in which they are asked."""
    from regraft.core.sources.demo import DemoSource
    from regraft.core.sources.folder import FileSource, FolderSource
    from regraft.core.sources.gguf import GgufSource
    from regraft.core.sources.hub import HubSource

    return [DemoSource(), GgufSource(), FileSource(), FolderSource(), HubSource()]


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, folder: Path = Path(), extra: Sequence[Source] = ()
) -> Checkpoint:
    """Open the checkpoint that `model` names: `demo:tiny`, a folder, a `.safetensors` or `.gguf` file, or a hub id.

    Args:
        model: what the recipe or the user wrote.
        revision: branch, tag or commit of a hub id.
        folder: where relative paths start.
        extra: sources of plugins, asked first.

    Raises:
        InputError: nothing accepts it, or what does cannot read it.
        PluginError: a plugin's source failed.
    """
    reference = Reference(str(model), revision, folder)
    if not reference.model:
        raise InputError("no checkpoint is named", expected="a folder, a file or a hub id", remedy="name one")
    for source in extra:
        with _blaming(source):
            if source.accepts(reference):
                return dequantised(source.open(reference))
    for source in built_in_sources():
        if source.accepts(reference):
            return dequantised(source.open(reference))
    raise InputError(
        "there is no such checkpoint",
        where=reference.model if reference.model.isprintable() else ascii(reference.model),
        expected="a folder, a .safetensors or .gguf file, a hub id such as org/name, or demo:tiny",
        remedy="check the path",
    )


@contextmanager
def _blaming(source: Source) -> Iterator[None]:
    try:
        yield
    except RegraftError:
        raise
    except Exception as error:
        raise PluginError(
            f"the source failed: {type(error).__name__}: {error}",
            where=f"source {source.name}",
            remedy="report it to the plugin's author",
        ) from error


def dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with bitsandbytes weights shown dequantised; anything else as it is.

    Raises:
        InputError: quantised by a method that regraft does not read.
    """
    if not checkpoint.config.get("quantization_config"):
        return checkpoint
    from regraft.core.sources.bitsandbytes import dequantise

    return dequantise(checkpoint)
