"""Checkpoints on the Hugging Face hub, through huggingface_hub's cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from glob import escape
from pathlib import Path
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError
from regraft.core.sources.folder import PICKLE_SUFFIXES, WEIGHT_SUFFIXES, open_folder, runtime_folders
from regraft.core.sources.open import Reference

ALLOWED = (
    "*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What is fetched: weights that are no pickles, and the small files beside them."""

IGNORED = ("*/*.safetensors", "consolidated*.safetensors")
"""The same weights once more, in other layouts."""

DEFAULT_REVISION = "main"

_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT_SECONDS = 5.0
"""For the first question to the hub; a server that does not answer that is treated as absent."""


class HubSource:
    """Accepts `org/name` and `name` where no such path exists."""

    name = "hub"

    def accepts(self, reference: Reference) -> bool:
        """Whether the model looks like a hub id and is nothing on this disk."""
        looks_like_file = Path(reference.model).suffix in WEIGHT_SUFFIXES
        return bool(_HUB_ID.fullmatch(reference.model)) and not looks_like_file and not reference.path.exists()

    def open(self, reference: Reference) -> Checkpoint:
        """Fetch what the cache lacks and open the snapshot. Without a network, or with HF_HUB_OFFLINE, the cache alone.

        Raises:
            InputError: the id is neither on the hub nor in the cache, access is refused, or the snapshot is no valid
                checkpoint.
        """
        snapshot, notes = _snapshot(reference)
        checkpoint = open_folder(snapshot, label=reference.model)
        origin = {
            "source": self.name,
            "repo": reference.model,
            "revision": reference.revision or DEFAULT_REVISION,
            "commit": snapshot.name,
            "sha256": _digests(snapshot),
        }
        return replace(checkpoint, origin=origin, notes=(*checkpoint.notes, *notes))


def _snapshot(reference: Reference) -> tuple[Path, tuple[str, ...]]:
    """The folder of the snapshot, and a note if the hub could not be asked."""
    from huggingface_hub import HfApi, snapshot_download

    request: dict[str, Any] = {
        "repo_id": reference.model,
        "revision": reference.revision or DEFAULT_REVISION,
        "allow_patterns": list(ALLOWED),
        "ignore_patterns": list(IGNORED),
    }
    try:
        # asked first because snapshot_download waits without limit for a server that accepts and says nothing
        info = HfApi().model_info(reference.model, revision=reference.revision, timeout=_TIMEOUT_SECONDS)
    except Exception as trouble:  # the client's exceptions differ between its versions; each gets its message
        return _from_cache(reference, request, trouble)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    _check_weights(reference, names)
    try:
        return Path(snapshot_download(**request | with_runtimes(names), etag_timeout=_TIMEOUT_SECONDS)), ()
    except Exception as trouble:
        raise _explained(reference, trouble) from trouble


def _from_cache(reference: Reference, request: dict[str, Any], trouble: Exception) -> tuple[Path, tuple[str, ...]]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        snapshot = Path(snapshot_download(**request, local_files_only=True))
    except Exception as missing:
        partial = getattr(missing, "snapshot_path", None)
        raise _incomplete(reference) if partial else _explained(reference, trouble) from trouble
    if isinstance(trouble, OfflineModeIsEnabled):
        return snapshot, ()
    return snapshot, (f"the hub could not be asked for {reference.model}, so its cached snapshot was used",)


def with_runtimes(names: Sequence[str]) -> dict[str, list[str]]:
    """What is fetched where the repository has folders of runtimes: these are fetched whole, but for pickles."""
    folders = runtime_folders(names)
    kept = [f"{escape(folder)}/*" for folder in sorted(folders)]
    pickles = [f"{pattern}{suffix}" for pattern in kept for suffix in sorted(PICKLE_SUFFIXES)]
    others = [
        escape(name) for name in names
        if any(fnmatch(name, pattern) for pattern in IGNORED) and name.rpartition("/")[0] not in folders
    ]  # fmt: skip
    return {"allow_patterns": [*ALLOWED, *kept], "ignore_patterns": [*others, *pickles]} if folders else {}


def _check_weights(reference: Reference, names: Sequence[str]) -> None:
    """Refuse a repository without safetensors before anything of it is fetched."""
    if any(name.endswith(".safetensors") for name in names):
        return
    other = sorted({Path(name).suffix for name in names} & WEIGHT_SUFFIXES)
    gguf = ".gguf" in other
    remedy = (
        "fetch one of its .gguf files and name that file"
        if gguf
        else "convert it once with a tool you trust; regraft never reads pickles, because they can run code"
    )
    raise InputError(
        "the repository has no safetensors weights",
        where=reference.model,
        expected="*.safetensors",
        found=", ".join(other) or "no weights",
        remedy=remedy,
    )


def _digests(snapshot: Path) -> dict[str, str]:
    """SHA-256 of the weights: the cache names large files by it, so it costs nothing."""
    links = {path.name: path.readlink().name for path in sorted(snapshot.glob("*.safetensors")) if path.is_symlink()}
    return {name: blob for name, blob in links.items() if _SHA256.fullmatch(blob)}


def _incomplete(reference: Reference) -> InputError:
    return InputError(
        "only a part of it is in the cache, and the hub cannot be reached",
        where=reference.model,
        remedy=f"fetch the rest where there is a network: hf download {reference.model}",
    )


def _explained(reference: Reference, trouble: Exception) -> InputError:
    """The message for what the hub's client raised; more special classes come before those they derive from."""
    from huggingface_hub import errors

    model, revision = reference.model, reference.revision or DEFAULT_REVISION
    fetch = f"check the path; or fetch the model where there is a network: hf download {model}"
    rows: list[tuple[type[Exception], str, str]] = [
        (
            errors.GatedRepoError,
            "is a gated model, and access to it is refused",
            "accept its terms on its page, then log in with: hf auth login",
        ),
        (
            errors.RepositoryNotFoundError,
            "there is no such folder, and no such model on the hub that you may read",
            "check the spelling; for a private model log in with: hf auth login",
        ),
        (errors.RevisionNotFoundError, f"the model has no revision {revision}", "name a branch, tag or commit of it"),
        (
            errors.HFValidationError,
            "there is no such folder, and the hub has no such ids",
            "check the path, or name a hub id such as org/name",
        ),
        (
            errors.OfflineModeIsEnabled,
            "there is no such folder, and no such model in the hub's cache (offline mode is on)",
            fetch,
        ),
    ]
    for kind, message, remedy in rows:
        if isinstance(trouble, kind):
            return InputError(message, where=model, remedy=remedy)
    return InputError(
        "there is no such folder, no such model in the hub's cache, and the hub cannot be reached",
        where=model,
        found=f"{type(trouble).__name__}: {trouble}".splitlines()[0][:200],
        remedy=fetch,
    )
