"""The hub as a source, against a prepared cache and a hub that is not there."""

from __future__ import annotations

import hashlib
import shutil
import socket
import time
from types import SimpleNamespace

import pytest
import torch

from regraft.core.errors import InputError
from regraft.core.sources.hub import ALLOWED, IGNORED, HubSource
from regraft.core.sources.open import Reference, open_checkpoint
from tests.families import save_tiny

COMMIT, OLD_COMMIT = "a" * 40, "b" * 40


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = save_tiny("llama", tmp_path_factory.mktemp("original"), tokenizer=True)
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, offline."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


def put(cache, repo, source, commit=COMMIT, *, ref="main", skip=()):
    """Store the files of `source` the way huggingface_hub does: blobs, and snapshots that link to them."""
    store = cache / f"models--{repo.replace('/', '--')}"
    snapshot, blobs = store / "snapshots" / commit, store / "blobs"
    for folder in (snapshot, blobs, store / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.name in skip:
            continue
        algorithm = hashlib.sha256 if path.suffix == ".safetensors" else hashlib.sha1
        blob = blobs / algorithm(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (store / "refs" / ref).write_text(commit)
    return snapshot


def refusal(model, revision=None, **options):
    with pytest.raises(InputError) as caught:
        open_checkpoint(model, revision=revision, **options)
    assert caught.value.remedy
    return caught.value


@pytest.mark.parametrize("repo", ["org/tiny-llama_1.0", "tiny"])
def test_cached_model_opens_offline(repo, cache, original):
    put(cache, repo, original)
    checkpoint = open_checkpoint(repo)
    weights = original / "model.safetensors"
    assert checkpoint.origin == {
        "source": "hub",
        "repo": repo,
        "revision": "main",
        "commit": COMMIT,
        "sha256": {"model.safetensors": hashlib.sha256(weights.read_bytes()).hexdigest()},
    }
    assert checkpoint.label == repo
    assert checkpoint.notes == ()
    assert {"config.json", "tokenizer.json", "LICENSE"} <= set(checkpoint.files)
    local = open_checkpoint(original)
    assert all(torch.equal(checkpoint.load(name), local.load(name)) for name in local.tensors)
    assert checkpoint.digest == local.digest


def test_revisions_resolve_to_commits(cache, original):
    put(cache, "org/model", original)
    put(cache, "org/model", original, OLD_COMMIT, ref="v1")
    assert open_checkpoint("org/model", revision="v1").origin["commit"] == OLD_COMMIT
    by_commit = open_checkpoint("org/model", revision=OLD_COMMIT).origin
    assert (by_commit["revision"], by_commit["commit"]) == (OLD_COMMIT, OLD_COMMIT)
    assert "offline" in refusal("org/model", "v2").message


def test_pickles_are_neither_asked_for_nor_read(cache, original, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    names = [
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "config.json",
        "tokenizer.model",
        "chat_template.jinja",
        "modeling_x.py",
        "LICENSE",
        "README.md",
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "consolidated.safetensors",
        "onnx/model.safetensors",
        "model.gguf",
        "flax_model.msgpack",
        "data.pkl",
    ]
    assert list(filter_repo_objects(names, allow_patterns=list(ALLOWED), ignore_patterns=list(IGNORED))) == names[:8]
    source = shutil.copytree(original, tmp_path / "pickled")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    put(cache, "org/pickled", source)
    assert "pickle" in refusal("org/pickled").message


def test_half_a_snapshot_is_refused(cache, original):
    put(cache, "org/model", original, skip={"model.safetensors"})
    assert "no weights" in refusal("org/model").message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing-folder", "no such folder, and no such model in the hub's cache (offline mode is on)"),
        ("org/none", "no such folder, and no such model in the hub's cache (offline mode is on)"),
        ("a..b", "no such folder, and the hub has no such ids"),
        ("../foo", "no such checkpoint"),
        ("out/missing/deep", "no such checkpoint"),
        (".hidden", "no such checkpoint"),
        ("/none/at/all", "no such checkpoint"),
        ("model.safetensors", "no such checkpoint"),
        ("model.gguf", "no such file"),
        ("with space", "no such checkpoint"),
    ],
)
def test_what_is_nowhere_is_said_plainly(model, message, cache, tmp_path):
    error = refusal(model, folder=tmp_path)
    assert message in error.message


def test_existing_paths_are_never_looked_up(tmp_path):
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").mkdir()
    assert not HubSource().accepts(Reference("org/model", folder=tmp_path))
    assert HubSource().accepts(Reference("org/other", folder=tmp_path))


class Answer:
    """What a hub client raises carries the response."""

    status_code, headers, request = 404, {}, SimpleNamespace(url="https://hub.invalid", method="GET")


@pytest.mark.parametrize(
    ("name", "message", "remedy"),
    [
        ("GatedRepoError", "gated", "accept its terms"),
        ("RepositoryNotFoundError", "no such model on the hub", "spelling"),
        ("RevisionNotFoundError", "no revision dev", "branch, tag or commit"),
    ],
)
def test_refusals_of_the_hub_are_explained(name, message, remedy, cache, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def model_info(self, repo_id, **options):
        raise getattr(errors, name)("refused", response=Answer())

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    error = refusal("org/model", "dev")
    assert message in error.message
    assert remedy in error.remedy
    assert error.where == "org/model"


@pytest.mark.parametrize(
    ("files", "found", "remedy"),
    [
        (["config.json", "pytorch_model.bin"], ".bin", "never reads pickles"),
        (["model-Q4_K_M.gguf"], ".gguf", "name that file"),
        (["README.md"], "no weights", "convert"),
    ],
)
def test_repository_without_safetensors_is_refused_before_any_download(files, found, remedy, cache, monkeypatch):
    import huggingface_hub

    siblings = [SimpleNamespace(rfilename=name) for name in files]
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, repo_id, **options: SimpleNamespace(siblings=siblings)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: pytest.fail("downloaded"))
    error = refusal("org/model")
    assert error.found == found
    assert remedy in error.remedy


def test_unreachable_hub_falls_back_to_the_cache_and_says_so(cache, original, monkeypatch):
    import huggingface_hub

    def model_info(self, repo_id, **options):
        raise OSError("network is down")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    error = refusal("org/model")
    assert "cannot be reached" in error.message
    assert error.found == "OSError: network is down"
    put(cache, "org/model", original)
    assert "cached snapshot" in open_checkpoint("org/model").notes[0]


def test_server_that_never_answers_costs_seconds(cache, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    from regraft.core.sources import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_TIMEOUT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        api = huggingface_hub.HfApi
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint=endpoint))
        begin = time.monotonic()
        assert "cannot be reached" in refusal("org/model").message  # connected by the kernel, never accepted
    assert 0.4 < time.monotonic() - begin < 10


def reachable(monkeypatch, download):
    """A hub that lists weights and answers downloads with `download`."""
    import huggingface_hub

    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo_id, **options: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_download_asks_for_the_revision_and_for_no_pickles(cache, original, monkeypatch):
    snapshot, requests = put(cache, "org/model", original), []

    def download(**options):
        requests.append(options)
        return str(snapshot)

    reachable(monkeypatch, download)
    origin = open_checkpoint("org/model", revision="v3").origin
    assert (origin["revision"], origin["commit"]) == ("v3", COMMIT)
    assert [(request["repo_id"], request["revision"]) for request in requests] == [("org/model", "v3")]
    assert requests[0]["allow_patterns"] == list(ALLOWED)


def test_access_refused_at_the_download_is_explained(cache, monkeypatch):
    from huggingface_hub import errors

    def download(**options):
        raise errors.GatedRepoError("refused", response=Answer())

    reachable(monkeypatch, download)
    assert "gated" in refusal("org/model").message


def test_partial_cache_is_told_from_none(cache, monkeypatch):
    import huggingface_hub

    def download(**options):
        error = FileNotFoundError("incomplete")
        error.snapshot_path = "somewhere"
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "only a part" in refusal("org/model").message
