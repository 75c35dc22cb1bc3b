"""`regraft push`, and the options of `apply` that do the same: an output goes to the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import human_bytes, print_json
from regraft.cli.options import Json

if TYPE_CHECKING:
    from regraft.core.hub_upload import Upload
    from regraft.core.recipe.model import Recipe

Private = Annotated[bool, typer.Option("--private", help="On the hub: in a private repository.")]
Branch = Annotated[str, typer.Option(metavar="BRANCH", help="On the hub: the branch, made if it is not there.")]
Licence = Annotated[
    str | None,
    typer.Option(
        "--license", metavar="NAME", help="On the hub: the licence, where the base's card says none, such as mit."
    ),
]


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The output of a recipe.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to: org/name, made if it is not there.")],
    private: Private = False,
    revision: Branch = "main",
    licence: Licence = None,
    as_json: Json = False,
) -> None:
    """Push an output to the Hugging Face hub, in one commit, after it was verified."""
    pushed = push_output(folder, upload_of(repo, private=private, revision=revision, licence=licence), as_json=as_json)
    if as_json:
        print_json(pushed)


def upload_of(repo: str | None, *, private: bool, revision: str, licence: str | None) -> Any:
    """What the options ask for; None if no repository is named.

    Raises:
        UsageError: there are options for the hub, and no repository.
    """
    from regraft.core.errors import UsageError

    if repo is not None:
        from regraft.core.hub_upload import Upload

        return Upload(repo, private, revision, licence)
    if private or revision != "main" or licence is not None:
        raise UsageError("--private, --revision and --license say how to push, but not where to", where="apply",
                         remedy="add --push-to-hub REPO")  # fmt: skip
    return None


def check_before(upload: Upload, recipe: Recipe) -> None:
    """Refuse before the recipe runs what could not be pushed afterwards.

    Raises:
        RegraftError: as `check_upload`.
    """
    from regraft.core.host import host
    from regraft.core.hub_upload import check_upload, licence_of
    from regraft.core.plan import open_base

    check_upload(upload, licence_of(open_base(recipe, host())))


def push_output(folder: Path, upload: Upload, *, as_json: bool) -> dict[str, Any]:
    """Push, and say so; the result as a JSON object.

    Raises:
        RegraftError: as `hub_upload.push`.
    """
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from regraft.core.host import host
    from regraft.core.hub_upload import push as run

    if as_json or not sys.stderr.isatty():
        disable_progress_bars()
    done = run(folder, upload, host())
    if not as_json:
        print(f"pushed {done.files} files, {human_bytes(done.nbytes)}: {done.url}")
    facts = {"repo": upload.repo, "revision": upload.revision, "private": upload.private}
    return {**facts, "url": done.url, "files": done.files, "bytes": done.nbytes}
