"""Pushing an output to the Hugging Face hub: one commit, with its licence, or nothing.

What can be refused is refused before anything is computed: no token, no known licence. What fails later fails after the
output stands, so that nothing is lost but the upload.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError, ResourceError, UsageError, VerificationError
from regraft.core.host import Host
from regraft.core.jsonio import dump, read_object
from regraft.core.provenance import front_matter, inherited
from regraft.core.sources.folder import CARD, LOCK, REPORTS
from regraft.core.verify.folder import verify_folder

MAIN = "main"
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_REPO = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LOGIN = "log in with: hf auth login; or set HF_TOKEN"


@dataclass(frozen=True)
class Upload:
    """Where an output is to go.

    Args:
        repo: hub id, such as `org/name`.
        private: make the repository private; a public one is refused.
        revision: branch, which is made if it is not there.
        licence: identifier for a model whose base says none.
    """

    repo: str
    private: bool = False
    revision: str = MAIN
    licence: str | None = None


@dataclass(frozen=True)
class Uploaded:
    """What was pushed."""

    url: str
    files: int
    nbytes: int


def check_upload(upload: Upload, licence: str | None) -> None:
    """Refuse, before anything is computed, what could not be pushed afterwards. Asks the hub whom the token belongs to.

    Args:
        upload: what is wanted.
        licence: that of the model, where its card says one.

    Raises:
        UsageError: no such ids, no known licence, another licence, or offline mode.
        ResourceError: no token, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    where = f"the hub: {upload.repo}"
    _check_licence(upload, licence)
    if not _REPO.fullmatch(upload.repo):
        raise UsageError("the hub has no such ids", where=where, expected="org/name, or name",
                         remedy="name the repository so")  # fmt: skip
    if constants.is_offline_mode():
        raise UsageError("nothing can be pushed in offline mode", where=where, found="HF_HUB_OFFLINE is set",
                         remedy="unset it")  # fmt: skip
    if get_token() is None:
        raise ResourceError("there is no token for the hub", where=where, remedy=_LOGIN)
    with _explained(upload, "run the same command again"):
        HfApi().whoami()


def licence_of(base: Checkpoint) -> str | None:
    """The licence that a base's card states, which its outputs inherit."""
    return _stated("\n".join(inherited(base)))


def push(folder: Path, upload: Upload, host: Host) -> Uploaded:
    """Push an output in one commit. In the repository, weights and reports of another output make way; all else stays.

    Args:
        folder: a checkpoint or an adapter, as regraft wrote it; is not changed.
        upload: where to.
        host: the plugins.

    Raises:
        InputError: it is no such folder.
        VerificationError: it is not what its lock file says.
        UsageError, ResourceError: as `check_upload`, or the hub refuses it.
    """
    check_folder(folder, host)
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    check_upload(upload, _stated(front_matter(card)))
    with _explained(upload, f"the output stands in {folder}: push it again with: {_again(folder, upload)}"):
        return _push(folder, upload)


def check_folder(folder: Path, host: Host) -> None:
    """Whether `folder` is a sound output.

    Raises:
        InputError: it is no output of regraft.
        VerificationError: it is not what its lock file says.
    """
    if not (folder / LOCK).is_file():
        raise InputError(f"has no {LOCK}", where=folder, expected="the output of a recipe",
                         remedy="name the folder that apply wrote; for any other: hf upload")  # fmt: skip
    if faults := verify_folder(folder, host.architectures()).faults:
        raise VerificationError("is not what its lock file says, so it is not pushed", where=folder,
                                found=faults[0], remedy="write it again")  # fmt: skip


def _push(folder: Path, upload: Upload) -> Uploaded:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    repo = api.create_repo(upload.repo, private=upload.private or None, exist_ok=True).repo_id
    if upload.private and not api.repo_info(repo).private:
        raise UsageError("the repository is public already", where=f"the hub: {repo}", expected="a private one",
                         remedy="make it private on its page, name another, or leave --private out")  # fmt: skip
    if upload.revision != MAIN:
        api.create_branch(repo, branch=upload.revision, exist_ok=True)
    changed = {} if upload.licence is None else published(folder, upload.licence)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    operations: list[Any] = [CommitOperationAdd(name, changed.get(name, folder / name)) for name in names]
    there = api.list_repo_files(repo, revision=upload.revision)
    operations += [CommitOperationDelete(name) for name in there if name not in names and _makes_way(name)]
    done = api.create_commit(repo, operations, commit_message="Written by regraft", revision=upload.revision)
    nbytes = sum(len(changed[name]) if name in changed else (folder / name).stat().st_size for name in names)
    return Uploaded(str(done.commit_url), len(names), nbytes)


def _makes_way(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json")) or name.startswith(f"{REPORTS}/")


def published(folder: Path, licence: str) -> dict[str, bytes]:
    """The files that state a licence given by hand: the model card, and the lock file with the card's digest."""
    card = (folder / CARD).read_bytes()
    if _stated(front_matter(card.decode())) is not None:
        return {}
    card, lock = licensed(card, licence), read_object(folder / LOCK)
    lock["output"]["files"][CARD] = {"bytes": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    return {CARD: card, LOCK: dump({**lock, "published": {"license": licence}})}


def licensed(card: bytes, licence: str) -> bytes:
    """A model card of ours with a licence in its front matter."""
    return card.replace(b"---\n", f"---\nlicense: {licence}\n".encode(), 1)


def _check_licence(upload: Upload, licence: str | None) -> None:
    where = f"the hub: {upload.repo}"
    if upload.licence is None and licence is None:
        raise UsageError(
            "the licence of the base is not known, so nobody could tell what others may do with the output",
            where=where, expected="`license:` in the base's model card",
            remedy="read the base's terms, then say which they are: --license apache-2.0",
        )  # fmt: skip
    if upload.licence is not None and not _LICENCE.fullmatch(upload.licence):
        raise UsageError("not an identifier of a licence", where="--license", expected="such as apache-2.0, mit, other",
                         found=ascii(upload.licence), remedy="take one of the hub's list")  # fmt: skip
    if upload.licence is not None and licence not in (None, upload.licence):
        raise UsageError("the base has another licence, which the output inherits", where="--license",
                         expected=licence, found=upload.licence, remedy="leave --license out")  # fmt: skip


def _stated(matter: str) -> str | None:
    match = re.search(r"^license: *([\w./:+-]+)$", matter, re.MULTILINE)
    return None if match is None or match[1] == "unknown" else match[1]


def _again(folder: Path, upload: Upload) -> str:
    options = ["--private"] * upload.private
    options += [f"--revision {upload.revision}"] * (upload.revision != MAIN)
    options += [f"--license {upload.licence}"] * (upload.licence is not None)
    return " ".join(["regraft push", quote(str(folder)), upload.repo, *options])


@contextmanager
def _explained(upload: Upload, again: str) -> Iterator[None]:
    """What the hub or its client says, in our words.

    Raises:
        ResourceError: always, when the client raises.
    """
    from huggingface_hub import errors

    try:
        yield
    except (UsageError, ResourceError):
        raise
    except errors.HfHubHTTPError as trouble:
        message, remedy = _refusal(trouble.response.status_code)
        raise _failed(upload, message, trouble, f"{remedy}; {again}") from trouble
    except ValueError as trouble:
        raise _failed(upload, "the hub refuses what is pushed", trouble, again) from trouble
    except Exception as trouble:  # of whichever HTTP library the client uses
        raise _failed(upload, "the upload failed", trouble, f"look at the network; {again}") from trouble


def _refusal(status: int) -> tuple[str, str]:
    return {
        401: ("the hub does not know the token", _LOGIN),
        403: ("the token may not write there", "take a token with the right to write, or another repository"),
        404: ("there is no such repository that the token may see", "check the name, and the token's rights"),
        413: ("the hub has no room for it", "free some space there"),
    }.get(status, (f"the hub answers with status {status}", "try later"))


def _failed(upload: Upload, message: str, trouble: Exception, remedy: str) -> ResourceError:
    text = (str(trouble).strip().splitlines() or [type(trouble).__name__])[0]
    return ResourceError(message, where=f"the hub: {upload.repo}", found=text[:200], remedy=remedy)
