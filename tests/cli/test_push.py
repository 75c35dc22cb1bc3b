"""Pushing to the hub: the real client, over HTTP, to a stub on loopback. Each command runs in a process of its own,
because the client reads its environment when it is imported.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.running import ABF, Ran, done, regraft, tree, write_recipe

LOCK = "regraft.lock.json"


@pytest.fixture
def hub():
    with Hub() as served:
        yield served


def called(environment, *arguments):
    command = [sys.executable, "-m", "regraft", *map(str, arguments)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in ran.stderr
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def recipe(licence="apache-2.0", **step):
    if licence:
        Path("base/README.md").write_text(f"---\nlicense: {licence}\n---\nA model.\n")
    return write_recipe(Path("r.toml"), "base", {**ABF, **step}, path="out")


def same(files, folder):
    return {name: data for name, data in files.items() if name != ".gitattributes"} == {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_apply_pushes_what_it_wrote_in_one_commit(workplace, hub):
    ran = called(hub.environment, "apply", recipe(), "--push-to-hub", "org/longer", "--private", "--json")
    assert ran.code == 0, ran.err
    files = hub.files("org/longer")
    assert same(files, Path("out"))
    assert b"license: apache-2.0\n" in files["README.md"]
    assert hub.repos["org/longer"]["private"] is True
    assert len([request for request in hub.requests if "/commit/" in request]) == 1
    assert ran.json["pushed"] == {
        "repo": "org/longer", "revision": "main", "private": True, "files": len(files) - 1,
        "url": f"{hub.url}/org/longer/commit/{'0' * 40}",
        "bytes": sum(path.stat().st_size for path in Path("out").rglob("*") if path.is_file()),
    }  # fmt: skip


def test_push_again_to_a_branch_with_a_licence_given_by_hand(workplace, hub):
    """The card on the hub states it, the lock file there agrees with the card, and it can still be reproduced."""
    done("apply", recipe(licence=""))
    before = tree(Path("out"))
    hub.repos["org/m"] = {"private": False, "branches": {"main": {"model.safetensors": b"old", "notes.md": b"mine"}}}
    refused = called(hub.environment, "push", "out", "org/m")
    assert refused.code == 2
    assert "remedy: read the base's terms, then say which they are: --license apache-2.0" in refused.err
    ran = called(hub.environment, "push", "out", "org/m", "--revision", "longer", "--license", "mit")
    assert ran.code == 0, ran.err
    assert ran.out.startswith("pushed ")
    assert tree(Path("out")) == before
    assert set(hub.files("org/m")) == {"model.safetensors", "notes.md"}, "another branch"
    files = hub.files("org/m", "longer")
    assert "model.safetensors" not in files, "weights of another output make way"
    assert files["notes.md"] == b"mine"
    del files["notes.md"]
    for name, data in files.items():
        path = Path("fetched", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert b"license: mit\n" in files["README.md"]
    assert json.loads(files[LOCK])["published"] == {"license": "mit"}
    assert done("verify", "fetched", "--json").json["ok"] is True
    assert done("reproduce", "fetched", "--json").json["findings"] == []


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("whoami", 401, "the hub does not know the token"),
        ("repos/create", 403, "the token may not write there"),
        ("/commit/", 500, "the hub answers with status 500"),
    ],
)
def test_what_the_hub_refuses_is_said_and_nothing_is_lost(workplace, hub, part, status, message):
    hub.refuse[part] = status
    ran = called(hub.environment, "apply", recipe(), "-o", "two words", "--push-to-hub", "org/m")
    assert ran.code == 4
    assert f"error: the hub: org/m: {message}" in ran.err
    if part == "whoami":
        assert not Path("two words").exists(), "asked before anything is computed"
    else:
        assert done("verify", "two words", "--json").json["ok"] is True
        assert "the output stands in two words: push it again with: regraft push 'two words' org/m" in ran.err


def test_a_public_repository_is_not_taken_for_a_private_one(workplace, hub):
    hub.repos["org/m"] = {"private": False, "branches": {"main": {}}}
    done("apply", recipe())
    ran = called(hub.environment, "push", "out", "org/m", "--private")
    assert ran.code == 2
    assert "the repository is public already" in ran.err
    assert hub.files("org/m") == {}


def test_what_is_not_as_written_is_not_pushed(workplace):
    done("apply", recipe())
    path = Path("out/config.json")
    path.write_text(path.read_text() + " ")
    ran = regraft("push", "out", "org/m")
    assert ran.code == 1
    assert "is not what its lock file says, so it is not pushed" in ran.err
    assert regraft("push", "base", "org/m").code == 3


def test_without_a_token_nothing_starts(workplace, hub, tmp_path):
    environment = {**hub.environment, "HF_HOME": str(tmp_path / "home")}
    del environment["HF_TOKEN"]
    ran = called(environment, "apply", recipe(), "--push-to-hub", "org/m")
    assert (ran.code, Path("out").exists(), hub.requests) == (4, False, [])
    assert "there is no token for the hub" in ran.err
    assert "remedy: log in with: hf auth login" in ran.err
