"""Two processes under torchrun (gloo) learn what one learns, in every way that the loop knows."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from regraft.core.errors import ResourceError
from regraft.core.training.distributed import Group, connected
from regraft.core.training.modes import bf16_is_fast
from tests.checkpoints import same_bits
from tests.core.training import ranks
from tests.core.training.ranks import CASES, RESUMED
from tests.core.training.support import model_of

ROOT = Path(__file__).parents[3]
SKIPPED = () if bf16_is_fast("cpu") else ("autocast",)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    """A link to a checkpoint for each case."""
    folder = tmp_path_factory.mktemp("cases")
    for name, case in CASES.items():
        if name not in SKIPPED:
            (folder / name).symlink_to(tiny_folder(case.family, **case.options))
    return folder


@pytest.fixture(scope="module")
def found(folders, tmp_path_factory):
    """What both processes came to, by rank."""
    results = tmp_path_factory.mktemp("results")
    command = [*TORCHRUN, "-m", "tests.core.training.ranks", str(folders), str(results)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[:6000]
    return [torch.load(results / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in CASES if name not in SKIPPED])
def test_two_learn_what_one_learns(name, folders, found):
    case = CASES[name]
    alone, (first, second) = ranks.train(case, folders / name), (one[name] for one in found)
    assert first["losses"] == second["losses"]
    assert same_bits(first["weights"], second["weights"]), "every process ends with the same bytes"
    assert first["losses"] == pytest.approx(alone["losses"], abs=case.loss_tolerance)
    assert first["norms"] == pytest.approx(alone["norms"], rel=case.loss_tolerance)
    before = dict(model_of(folders / name, dtype=case.dtype).named_parameters())
    moved = 0.0
    for key, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=0, atol=case.tolerance)
        moved = max(moved, (value - before[key]).abs().max().item())
    assert moved > 1.5 * case.tolerance


@pytest.mark.parametrize("name", RESUMED)
def test_two_go_on_and_end_with_the_same_bytes(name, found):
    whole, resumed = found[0][name], found[0][f"resumed: {name}"]
    assert same_bits(whole["weights"], resumed["weights"])
    assert whole["losses"] == resumed["losses"]
    assert len(resumed["norms"]) == len(whole["norms"]) - 2, "two steps were not done again"


def test_afterwards_the_model_is_a_plain_one_and_can_learn_again(folders, found):
    kinds, outcome = found[0]["twice"]
    expected, alone = ranks.twice(folders / "whole")
    assert kinds == expected
    assert outcome["losses"] == pytest.approx(alone["losses"], abs=1e-4)


def test_a_loss_that_is_not_finite_ends_both_with_the_same_words(found):
    first, second = found[0]["not finite"], found[1]["not finite"]
    assert first == second
    assert first.startswith("TransformationError")
    assert "data.jsonl:6" in first
    assert "the weights after step" in first


def test_processes_that_do_not_train_the_same_are_refused(found):
    assert found[0]["disagreement"] == found[1]["disagreement"]
    assert "process 1: the processes do not train the same" in found[0]["disagreement"]
    assert "settings.lr was 0.001 and is 0.002" in found[0]["disagreement"]


def test_a_lost_connection_is_told_in_our_words():
    text = "[/build/pair.cc:537] Read error [127.0.0.1]:52621: Connection reset by peer. This is typically"

    def lose(world, error):
        with connected(world):
            raise error

    with pytest.raises(ResourceError, match="another process of this run has ended") as caught:
        lose(2, RuntimeError(text))
    assert caught.value.found == "Read error [127.0.0.1]:52621: Connection reset by peer"
    with pytest.raises(RuntimeError, match="pair"):
        lose(1, RuntimeError(text))
    with pytest.raises(RuntimeError, match="shapes"):
        lose(2, RuntimeError("shapes differ"))


def test_alone_everything_is_one_s_own():
    group, tensors = Group(), {"a": torch.ones(2)}
    assert group.gather(3) == [3]
    assert group.share("x") == "x"
    assert same_bits(group.hand_out(group.collect(tensors)), tensors)
