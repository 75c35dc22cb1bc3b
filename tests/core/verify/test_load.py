"""The deeper checks: stock transformers, in a process without regraft, loads the folder and computes."""

import json
import subprocess
import sys

import pytest

from regraft.core.errors import VerificationError
from regraft.core.verify import load as loading
from regraft.core.verify.folder import verify_folder
from regraft.core.verify.load import verify_load
from tests.checkpoints import read_all, write_checkpoint


def answer(**facts):
    """What the process prints."""
    keys = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "finite": True}
    return json.dumps({**keys, **facts})


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the process by one that prints what it is told."""

    def replace(output, code=0, stderr=""):
        done = subprocess.CompletedProcess([], code, output, stderr)
        monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: done)

    return replace


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"error": "ValueError: no such class"}, ["cannot load", "ValueError: no such class"]),
        ({"error": "RuntimeError: shape", "stage": "forward"}, ["cannot compute with", "RuntimeError: shape"]),
        ({"missing_keys": ["a.weight"]}, ["misses tensors", "a.weight"]),
        (
            {"unexpected_keys": [f"t{number}" for number in range(9)]},
            ["does not know", "t0, t1, t2, t3, t4 and 4 more"],
        ),
        ({"mismatched_keys": ["b"]}, ["other shapes", "b"]),
        ({"finite": False}, ["the logits are not finite"]),
    ],
)
def test_what_is_refused(facts, words, stand_in, tmp_path):
    stand_in("a warning\n" + answer(**facts))
    with pytest.raises(VerificationError) as caught:
        verify_load(tmp_path, "forward", trust=False, label="the output")
    assert caught.value.where == "the output"
    assert caught.value.remedy
    for word in words:
        assert word in str(caught.value)


def test_old_buffers_do_not_count(stand_in, tmp_path):
    stand_in(answer(unexpected_keys=["model.layers.0.self_attn.rotary_emb.inv_freq"]))
    assert verify_load(tmp_path, "load", trust=False)["finite"]


def test_a_process_that_dies(stand_in, tmp_path):
    stand_in("", code=-9, stderr="Killed")
    with pytest.raises(VerificationError, match="cannot load") as caught:
        verify_load(tmp_path, "load", trust=False)
    assert caught.value.found == "the process ended with status -9: Killed"


def test_a_process_that_hangs(monkeypatch, tmp_path):
    def hang(command, **options):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(VerificationError, match="cannot load") as caught:
        verify_load(tmp_path, "load", trust=False)
    assert "no answer" in caught.value.found


def test_the_process_sees_neither_regraft_nor_a_network(monkeypatch, tmp_path):
    seen = {}

    def record(command, **options):
        seen.update(options, command=command)
        return subprocess.CompletedProcess(command, 0, answer(), "")

    monkeypatch.setattr(subprocess, "run", record)
    verify_load(tmp_path, "load", trust=False)
    assert seen["command"][:2] == [sys.executable, "-I"]
    assert seen["command"][-1] == "0"
    assert seen["env"]["HF_HUB_OFFLINE"] == "1"
    assert seen["stdin"] is subprocess.DEVNULL
    source = (loading.Path(loading.stock_load.__file__)).read_text()
    assert "import regraft" not in source
    assert "from regraft" not in source


@pytest.mark.slow
def test_a_good_checkpoint_and_one_that_lacks_a_tensor(tiny_folder, tmp_path):
    """For real: two processes that import transformers."""
    good = verify_folder(tiny_folder("llama"), depth="forward")
    assert good.faults == []
    assert good.stock["class"] == "LlamaForCausalLM"
    assert good.stock["batch_error"] < 1e-4
    tensors = read_all(tiny_folder("llama"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    config = json.loads((tiny_folder("llama") / "config.json").read_text())
    broken = verify_folder(write_checkpoint(tmp_path / "broken", tensors, config=config), depth="load")
    assert "a tensor is missing that the config calls for" in {finding.message for finding in broken.faults}
    (stock,) = (finding for finding in broken.faults if "stock transformers" in finding.message)
    assert stock.found == "model.layers.1.mlp.up_proj.weight"
