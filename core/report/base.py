"""The base that an output was made from, if it can be opened here without asking the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import RegraftError
from regraft.core.lock_file import Lock
from regraft.core.sources.open import Source, open_checkpoint


@dataclass(frozen=True)
class Base:
    """A base to compare with.

    Args:
        checkpoint: the base; None where there is none to compare with.
        same: whether it is the base of the lock file, by the digest of its specs and files.
        note: what a reader of the page should know of it.
        place: where it was found, if it is one of the disk that nobody named.
    """

    checkpoint: Checkpoint | None
    same: bool
    note: str
    place: Path | None = None


def find_base(lock: Lock, folder: Path, given: str | None, extra: Sequence[Source] = ()) -> Base:
    """Open what `given` names, or look for the base of the lock file: `demo:tiny`, the hub's cache, or a folder of its
    name in the current folder or beside the output.

    Args:
        lock: of the output.
        folder: of the output.
        given: what the user names; None to look.
        extra: sources of plugins.

    Raises:
        InputError: what the user names cannot be opened.
    """
    if given is not None:
        checkpoint = open_checkpoint(given, extra=extra)
        if checkpoint.digest == lock.base.digest:
            return Base(checkpoint, same=True, note="")
        return Base(checkpoint, same=False, note="The base given is not the one of the lock file: its digest differs, "
                    "so every tensor was compared.")  # fmt: skip
    for place in _candidates(lock, folder):
        try:
            checkpoint = open_checkpoint(place)
        except RegraftError:
            continue
        if checkpoint.digest == lock.base.digest:
            return Base(checkpoint, same=True, note="", place=place if isinstance(place, Path) else None)
    return Base(None, same=False, note="The base was not at hand, so sizes of changes were not measured: the lock file "
                "tells which tensors were rewritten. Name the base with --base.")  # fmt: skip


def _candidates(lock: Lock, folder: Path) -> list[str | Path]:
    model = lock.base.model
    if lock.base.source == "demo":
        return [model]
    if lock.base.source == "hub":
        return [snapshot for snapshot in [_cached(lock)] if snapshot is not None]
    places = [Path(model), folder.resolve().parent / model]
    return [place for place in places if place.exists() and not place.resolve().samefile(folder)]


def _cached(lock: Lock) -> Path | None:
    """The snapshot of a hub model in the cache; the hub is not asked."""
    from huggingface_hub import snapshot_download

    commit = (lock.base.model_extra or {}).get("commit")
    try:
        return Path(snapshot_download(lock.base.model, revision=commit or None, local_files_only=True))
    except Exception:  # the client's exceptions differ between its versions; all mean that it is not there
        return None
