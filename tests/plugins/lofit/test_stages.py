"""Both stages: what is chosen and learnt, from what losses, the same every time."""

import json
import math

import pytest
import torch

from regraft.core.head_file import HeadFile
from regraft.core.training.objectives import Dpo
from regraft.core.transformation import Run
from regraft.plugins.lofit.adapters import HeadOffsets
from regraft.plugins.lofit.aim import Aim
from regraft.plugins.lofit.lesson import Lesson
from regraft.plugins.lofit.math import best, by_layer, drawn, head_count
from regraft.plugins.lofit.params import LofitParams
from tests.checkpoints import same_bits
from tests.core.residual.support import open_base
from tests.plugins.lofit.support import lofit, rows, write_rows

FAST = {"select": {"steps": 2}, "tune": {"steps": 4, "lr": 0.1}}


def lesson_of(folder, data, run=None, **values):
    checkpoint, _ = open_base(folder)
    params = LofitParams.model_validate({"data": str(data), "precision": "float32", **values})
    return Lesson(checkpoint, Aim.of(checkpoint, params).architecture, params, run or Run("lofit"))


def test_answers_are_learnt(tiny_folder, answers):
    done = lofit(tiny_folder("llama"), answers, heads=2, held_out=str(answers), tune={"epochs": 8, "lr": 0.1})
    before, after = (done.patch.metrics["held_out"][name]["loss"] for name in ("before", "after"))
    assert after < before - 0.5
    metrics = done.patch.metrics
    assert (metrics["heads"], metrics["of"], metrics["learnt_numbers"]) == (2, 8, 2 * 16)
    assert metrics["tune"]["steps"] == len(done.losses) == 16
    assert metrics["select"]["steps"] == 10, "five epochs of two batches"
    assert metrics["data"]["sequences"] == 16


def test_only_answers_count(tiny_folder, answers):
    """Oracle 12: the tokens that are learnt are those of the answers and the end token after each."""
    done = lofit(tiny_folder("llama"), answers, heads=1, **FAST)
    assert done.patch.metrics["data"]["learnt_tokens"] == 16 * len("cat") + 16
    lesson = lesson_of(tiny_folder("llama"), answers, task="sft")
    (batch,) = lesson.batches("tune", lesson.params.tune).micro(0)
    loss, _ = lesson.objective(lesson.head)(batch)
    labels = batch.labels.clone()
    first = (labels != -100).float().argmax(1)
    for row, start in enumerate(first.tolist()):
        assert start > 2
        assert (labels[row, :start] == -100).all()
    assert loss.item() > 0


def test_preferences_are_learnt(tiny_folder, preferences):
    """Oracle 11: DPO begins at ln 2, because the reference is the model itself; then it learns."""
    done = lofit(tiny_folder("llama"), preferences, task="dpo", heads=2, held_out=str(preferences),
                 layers="1-", tune={"epochs": 8, "lr": 0.1})  # fmt: skip
    assert done.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    held_out = done.patch.metrics["held_out"]
    assert held_out["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert held_out["after"]["loss"] < 0.5
    assert held_out["after"]["accuracy"] > 0.8
    assert held_out["after"]["margin"] > held_out["before"]["margin"] == pytest.approx(0.0, abs=1e-5)


def test_first_gradient_of_dpo(tiny_folder, preferences):
    """Oracle 11: at v = 0 it is -β/2 times that of log π(chosen) - log π(rejected)."""
    lesson = lesson_of(tiny_folder("llama"), preferences, task="dpo", beta=0.3)
    offsets = HeadOffsets(lesson.model, lesson.architecture, {0: (1,), 1: (2,)}, "head")
    parameters = list(offsets.parameters.values())
    objective = lesson.objective(lesson.head)
    (batch,) = lesson.batches("tune", lesson.params.tune).micro(0)
    with offsets.attached():
        for one in parameters:
            one.requires_grad_(True)
        loss, _ = objective(batch)
        found = torch.autograd.grad(loss, parameters)
        log_probs = -lesson.head.label_losses(batch, reduction="none").sum(1)
        expected = torch.autograd.grad(log_probs[:8].sum() - log_probs[8:].sum(), parameters)
    assert isinstance(objective, Dpo)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, -0.15 * other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scoring", ["scale", "grad", "random"])
@pytest.mark.parametrize("site", ["head", "kv-group"])
def test_scorings(tiny_folder, answers, scoring, site):
    done = lofit(tiny_folder("llama"), answers, heads=2, scoring=scoring, site=site, tune={"steps": 2},
                 **({"select": {"steps": 4}} if scoring == "scale" else {}))  # fmt: skip
    facts = json.loads(done.patch.reports["heads.json"].read())
    assert (facts["scoring"], facts["site"], facts["num_layers"]) == (scoring, site, 2)
    assert facts["num_heads"] == (4 if site == "head" else 2)
    assert len(set(done.heads)) == 2
    kind = "heads" if site == "head" else "kv_groups"
    assert sorted(done.vectors) == sorted(f"layers.{layer}.{kind}.{unit}" for layer, unit in done.heads)
    assert ("scores" in facts) == (scoring != "random")
    assert ("select-loss.png" in done.patch.reports) == (scoring == "scale")
    if scoring != "random":
        scores = {(layer, unit): one for layer, row in enumerate(facts["scores"]) for unit, one in enumerate(row)}
        assert len(scores) == 2 * facts["num_heads"]
        assert done.heads == best(scores, 2)


def test_gradient_scores_are_those_of_the_whole_data(tiny_folder, answers):
    """‖∂L/∂A‖ of the mean loss over all tokens, however the data is cut into batches."""
    lesson = lesson_of(tiny_folder("llama"), answers, task="sft", scoring="grad")
    from regraft.plugins.lofit.adapters import HeadScales

    scales = HeadScales(lesson.model, lesson.architecture, [0, 1], "head", std=0.0)
    batch = lesson.batches("tune", lesson.params.tune).gather(range(16))
    with scales.attached():
        for one in scales.parameters.values():
            one.requires_grad_(True)
        (lesson.head.label_losses(batch) / batch.learnt).backward()
    expected = [one.grad.norm(dim=1).tolist() for one in scales.parameters.values()]
    for options in ({"batch_size": 8}, {"batch_size": 5, "micro_batch": 2}):
        done = lofit(tiny_folder("llama"), answers, heads=2, scoring="grad", tune={"steps": 1}, **options)
        found = json.loads(done.patch.reports["heads.json"].read())["scores"]
        assert found[0] == pytest.approx(expected[0], rel=1e-4)
        assert found[1] == pytest.approx(expected[1], rel=1e-4)


def test_heads_of_a_file(tiny_folder, answers, tmp_path):
    path = tmp_path / "heads.json"
    path.write_bytes(HeadFile(((1, 3), (0, 2), (1, 0)), scores=((1.0, 2, 3, 4), (5, 6, 7, 8))).as_bytes())
    options = {"scoring": "file", "heads_file": path, "tune": {"steps": 1}}
    every = lofit(tiny_folder("llama"), answers, **options)
    assert every.heads == [(1, 3), (0, 2), (1, 0)]
    assert json.loads(every.patch.reports["heads.json"].read())["scores"] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert lofit(tiny_folder("llama"), answers, heads=2, **options).heads == [(1, 3), (0, 2)]
    above = lofit(tiny_folder("llama"), answers, layers=1, **options)
    assert above.heads == [(1, 3), (1, 0)]
    assert above.patch.metrics["prefix_cache"]["cached_layers"] == 1


def test_layers_bound_what_is_chosen(tiny_folder, answers):
    done = lofit(tiny_folder("llama"), answers, layers="1-", heads=3, **FAST)
    assert {layer for layer, _ in done.heads} == {1}
    assert json.loads(done.patch.reports["heads.json"].read())["scores"][0] == [None] * 4


def test_strong_penalty_leaves_nothing(tiny_folder, answers):
    """Oracle 10: scores then are below those of the draw, √d_h · 1e-3."""
    values = {"heads": 1, "tune": {"steps": 1}}
    scores = []
    for l1 in (100.0, 0.0):
        done = lofit(tiny_folder("llama"), answers, select={"l1": l1, "epochs": 20, "lr": 1e-3}, **values)
        table = json.loads(done.patch.reports["heads.json"].read())["scores"]
        scores.append(max(one for row in table for one in row))
    assert scores[0] < 0.5 * math.sqrt(16) * 1e-3 < scores[1]


def test_cached_and_whole_learn_the_same(tiny_folder, answers):
    """Oracle 6: only rounding differs; `off` and `on` are told apart by what they report."""
    options = {"layers": 1, "heads": 2, "scoring": "random", "tune": {"epochs": 4, "lr": 0.05}}
    folder = tiny_folder("llama")
    cached = lofit(folder, answers, prefix_cache="on", **options)
    whole = lofit(folder, answers, prefix_cache="off", **options)
    assert cached.patch.metrics["prefix_cache"]["predicted_speed_up"] == 1.5
    assert whole.patch.metrics["prefix_cache"]["cached_layers"] == 0
    assert cached.losses == pytest.approx(whole.losses, rel=1e-4)
    for name, vector in cached.vectors.items():
        assert vector.norm() > 0.1
        torch.testing.assert_close(vector, whole.vectors[name], rtol=0, atol=2e-3)


def test_reference_from_the_cached_prefix(tiny_folder, preferences):
    """Where stage 1 has not run the whole model, the reference of DPO comes from the cache."""
    options = {"task": "dpo", "layers": 1, "heads": 2, "scoring": "random", "tune": {"epochs": 3, "lr": 0.05}}
    cached, whole = (lofit(tiny_folder("llama"), preferences, prefix_cache=wish, **options) for wish in ("on", "off"))
    assert cached.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert cached.losses == pytest.approx(whole.losses, rel=1e-4)


def test_what_the_prefix_cache_says(tiny_folder, answers):
    options = {"heads": 1, "scoring": "random", "tune": {"steps": 2}}
    cached = lofit(tiny_folder("llama"), answers, layers=1, **options)
    lines = [line for line in cached.told if line.startswith("prefix cache")]
    assert "the lower 1 of 2 layers ran once" in lines[0]
    assert "should be 1.50 times as fast" in lines[0]
    assert lines[1].endswith("times as fast as without, measured on the first batch")
    assert cached.told.index(lines[0]) < next(i for i, line in enumerate(cached.told) if line.startswith("step 1/"))
    lowest = lofit(tiny_folder("llama"), answers, layers=0, **options)
    assert any("a head of layer 0 is chosen" in line for line in lowest.told)
    assert "no prefix cache: a head of layer 0 is chosen" in lowest.patch.notes
    small = lofit(tiny_folder("llama"), answers, layers=1, prefix_bytes=1000, **options)
    assert any("larger than they may be" in line for line in small.told)
    assert any("larger than they may be" in note for note in small.patch.notes)


def test_the_same_bytes_every_time(tiny_folder, answers, plots):
    one, other = (
        lofit(tiny_folder("llama"), answers, heads=2, layers="1-", held_out=str(answers), **FAST) for _ in (0, 1)
    )
    assert {name: file.read() for name, file in one.patch.reports.items()} == {
        name: file.read() for name, file in other.patch.reports.items()
    }
    assert one.patch.metrics == other.patch.metrics
    another = lofit(tiny_folder("llama"), answers, heads=2, layers="1-", run=Run("lofit", seed=1), **FAST)
    assert not same_bits(one.vectors, another.vectors)


def test_pieces_of_a_batch_learn_the_same(tiny_folder, answers):
    whole, pieces = (
        lofit(tiny_folder("llama"), answers, heads=2, scoring="random", micro_batch=size, tune={"steps": 4})
        for size in (None, 3)
    )
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-5)


def test_the_last_batch_may_be_smaller(tiny_folder, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", rows(9))
    done = lofit(tiny_folder("llama"), data, heads=1, scoring="random", tune={"epochs": 3})
    assert done.patch.metrics["tune"]["steps"] == 6


@pytest.mark.parametrize("frozen", ["bfloat16", "nf4"])
def test_frozen_weights_in_less(tiny_folder, answers, frozen):
    """Held smaller while offsets learn; the checkpoint keeps its own weights."""
    from regraft.core.training.modes import bf16_is_fast

    if frozen == "bfloat16" and not bf16_is_fast("cpu"):
        pytest.skip("this machine computes bfloat16 slowly")
    done = lofit(tiny_folder("llama"), answers, heads=2, frozen=frozen, precision="auto", layers="1-",
                 held_out=str(answers), tune={"epochs": 6, "lr": 0.1})  # fmt: skip
    held_out = done.patch.metrics["held_out"]
    assert held_out["after"]["loss"] < held_out["before"]["loss"] - 0.3
    assert not set(done.patch.edits) & set(done.checkpoint.specs)


def test_logs(tiny_folder, answers, tmp_path):
    done = lofit(tiny_folder("llama"), answers, heads=1, log=tmp_path / "run.jsonl", **FAST)
    lines = (tmp_path / "run.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == done.losses
    assert len((tmp_path / "run-select.jsonl").read_text().splitlines()) == 2


def test_numbers():
    assert head_count(3, 100, 50) == 3
    assert head_count(0.03, 270, 270) == 8
    assert head_count(0.01, 20, 20) == 1
    assert best({(0, 1): 1.0, (1, 0): 2.0, (0, 0): 1.0}, 3) == [(1, 0), (0, 0), (0, 1)], "ties by layer and head"
    assert by_layer([(3, 1), (0, 2), (3, 0)]) == {0: (2,), 3: (0, 1)}
    heads = drawn(range(2, 6), 4, 5, seed=7)
    assert heads == sorted(set(heads)) == drawn(range(2, 6), 4, 5, seed=7)
    assert all(2 <= layer < 6 and 0 <= head < 4 for layer, head in heads)
    assert heads != drawn(range(2, 6), 4, 5, seed=8)
