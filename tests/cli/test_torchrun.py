"""`torchrun -m regraft apply`: two processes give one checkpoint and one message, whoever fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.plugin_host import host_with
from tests.running import ABF, done, write_recipe
from tests.trainer import Trainer, installed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "regraft"]
TRAIN, ABF_16K = {"use": "trainer", "lr": 1e-4, "steps": 4}, {**ABF, "target_length": 16384}


@pytest.fixture
def together(tmp_path, monkeypatch):
    """Called with options of `apply`, and environment variables, what torchrun's processes did."""
    monkeypatch.chdir(tmp_path)
    variables = installed(tmp_path / "plugin")
    write_recipe(Path("recipe.toml"), "demo:tiny", TRAIN, ABF_16K, {**TRAIN, "id": "again"})

    def run(*options, **accident):
        command = [*TORCHRUN, "apply", "recipe.toml", "-o", "out", "--no-durable", *options]
        return subprocess.run(
            command, env={**variables, **accident}, capture_output=True, text=True, timeout=150, check=False
        )

    return run


def ours(ran):
    """What our processes said before torchrun adds its own report."""
    lines = ran.stderr.splitlines()
    return [line for line in lines[: next((n for n, line in enumerate(lines) if line.startswith("Traceback")), None)]
            if "torch/distributed/" not in line]  # fmt: skip


def losses(folder, step):
    return [float(line) for line in Path(folder, "regraft", step, "losses.txt").read_text().splitlines()]


def test_a_process_that_fails_ends_both_and_the_next_run_goes_on(together, monkeypatch):
    failed = together(TRAINER_ACCIDENT="raise:3", TRAINER_STEP="again", TRAINER_RANK="1")
    assert failed.returncode != 0
    lines = ours(failed)
    assert lines.count("error: the data: the trainer stumbles") == 1
    assert sum(line.startswith("error") for line in lines) == 1
    assert sum("the state of the training is kept" in line for line in lines) == 1
    assert failed.stderr.count("exitcode  : 1 ") == 2, "both end with the same code"
    assert not Path("out").exists()
    assert [path.name for path in Path(".out.regraft/state/again/tune").iterdir()] == ["step-00000002"]

    ran = together()
    assert ran.returncode == 0, ran.stderr
    assert [line for line in ours(ran) if "went on" in line] == ["went on from step 4", "went on from step 2"]
    assert ran.stdout.count("wrote out") == 1
    assert not Path(".out.regraft").exists()
    done("verify", "out", "--deep")
    assert json.loads(Path("out/regraft.lock.json").read_text())["environment"]["processes"] == 2

    host = host_with(Trainer)
    monkeypatch.setattr("regraft.core.host.host", lambda: host)
    done("apply", "recipe.toml", "-o", "alone", "--no-durable")
    for step in ("trainer", "again"):
        assert losses("out", step) == pytest.approx(losses("alone", step), abs=1e-4)
    two, one = load_file("out/model.safetensors"), load_file("alone/model.safetensors")
    assert two.keys() == one.keys()
    for name, tensor in one.items():
        assert (two[name].float() - tensor.float()).abs().max() <= 2e-3, name


def test_a_batch_that_cannot_be_shared_is_refused_once(together):
    refused = together("--set", "trainer.batch_size=3")
    lines = ours(refused)
    assert lines.count("error: batch_size: the batch cannot be shared equally") == 1
    assert sum(line.startswith("error") for line in lines) == 1
    assert "expected: a multiple of 2" in refused.stderr
    assert not Path(".out.regraft").exists()
