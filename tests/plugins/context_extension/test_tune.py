"""`tune` is the paper's recipe, under the scale that the exported checkpoint computes."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from regraft.core.demo import TINY
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.patch import Patch, overlay
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.context_extension import ContextExtension
from regraft.plugins.context_extension import tune as tuning
from regraft.plugins.context_extension.model import model_of
from tests.families import save_tokenizer
from tests.materialise import materialise
from tests.plugins.context_extension.support import WINDOW, load, params, rewrite_config, save, token_ids

EXPORTS: dict[str, dict[str, Any]] = {
    "native": {},
    "remote-code": {"export": "remote-code", "skip_layers": 0},
    "abf-only": {"export": "abf-only"},
}
QUICK = {"precision": "float32", "batch_size": 4, "epochs": 1, "lr": 1e-3}


def text(length: int, seed: int) -> str:
    """So many characters, which are tokens of the tiny models."""
    return "".join(chr(97 + (seed * 7 + index * (seed + 3)) % 26) for index in range(length))


def lines(path: Path, count: int = 8, length: int = 40) -> Path:
    """A file of texts, of `length` tokens with the end token."""
    rows = [json.dumps({"text": text(length - 1, seed)}) for seed in range(count)]
    path.write_text("\n".join(rows) + "\n")
    return path


def base(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    save(family, folder, **overrides)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return base(tmp_path / "llama")


def tuned(folder: Path, data: Path | dict[str, Any], run: Run | None = None, **values: Any) -> Patch:
    """Check, plan and apply; keys of the fine-tune are in `tune`."""
    checkpoint, step = open_folder(folder, label="base"), ContextExtension()
    source = data if isinstance(data, dict) else str(data)
    keys = {**QUICK, **values.pop("tune", {})}
    given = params(**values, tune={"data": source, **{name: one for name, one in keys.items() if one is not None}})
    step.check(checkpoint, given)
    patch = step.apply(checkpoint, given, run or Run("step"))
    assert step.plan(checkpoint, given).deviations(patch) == []
    return patch


def weights(folder: Path, patch: Patch) -> dict[str, Any]:
    after = overlay(open_folder(folder, label="base"), patch, by="step")
    return {name: after.load(name) for name in after.specs}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_hundred_samples_are_six_steps_of_the_papers_recipe(llama: Path, tmp_path: Path) -> None:
    """Appendix A: batch 32, two epochs, the last batch of each left out; AdamW at 2e-5, cosine without warmup."""
    log = tmp_path / "log.jsonl"
    paper = {"batch_size": None, "epochs": None, "lr": None, "micro_batch": 32, "log": log}
    patch = tuned(llama, lines(tmp_path / "data.jsonl", 100, 20), tune=paper)
    figures = patch.metrics["tune"]
    assert figures["steps"] == figures["planned_steps"] == 6
    assert figures["data"]["sequences"] == figures["data"]["beyond_window"] == 100
    assert figures["tokens"] == 6 * 32 * 20
    rates = [json.loads(line)["lr"] for line in log.read_text().splitlines()]
    assert rates == pytest.approx([2e-5 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])
    given = params(tune={"data": "x.jsonl"}).tune
    assert given is not None
    training = given.training(3)
    assert (training.optimizer, training.betas, training.weight_decay) == ("adamw", (0.9, 0.95), 0.1)
    assert (training.lr, training.schedule, training.warmup_steps, training.seed) == (2e-5, "cosine", 0, 3)
    assert sorted(patch.reports) == ["loss.png", "losses.jsonl"]
    assert len(patch.reports["losses.jsonl"].read().splitlines()) == 6


@pytest.mark.parametrize("export", EXPORTS)
def test_the_model_learns_under_the_scale_that_is_exported(export: str, llama: Path, tmp_path: Path) -> None:
    """The loss of the first step is that of the extended checkpoint as transformers loads it from the disk."""
    import torch
    from transformers import AutoTokenizer

    data = lines(tmp_path / "data.jsonl", 4)
    patch = tuned(llama, data, **EXPORTS[export])
    plain = ContextExtension().apply(open_folder(llama, label="base"), params(**EXPORTS[export]), Run("step"))
    folder = materialise(overlay(open_folder(llama, label="base"), plain, by="step"), tmp_path / "extended")
    model = load(folder, trust=export == "remote-code")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = [[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
            for line in data.read_text().splitlines()]  # fmt: skip
    ids = torch.tensor(rows)
    assert ids.shape == (4, 40)
    assert patch.metrics["tune"]["first_loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


def test_the_scale_makes_a_difference_to_what_is_learnt(llama: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", 4)
    losses = [tuned(llama, data, **values).metrics["tune"]["first_loss"] for values in EXPORTS.values()]
    assert len({round(loss, 4) for loss in losses}) == 3


def test_layers_that_are_skipped_are_skipped_while_it_learns(llama: Path, tmp_path: Path) -> None:
    """With every layer skipped the code computes what abf-only does: the same bytes are learnt."""
    data = lines(tmp_path / "data.jsonl")
    skipped = [weights(llama, tuned(llama, data, export="remote-code", skip_layers=count)) for count in (0, 1, 2)]
    plain = weights(llama, tuned(llama, data, export="abf-only"))
    assert same(skipped[2], plain)
    assert not same(skipped[1], plain)
    assert not same(skipped[0], skipped[1])


@pytest.mark.parametrize("export", EXPORTS)
def test_the_written_checkpoint_is_the_trained_model(
    export: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock transformers reloads it: every key in place, and the logits of the model as it was in memory."""
    import torch

    in_memory: list[torch.Tensor] = []
    stored = tuning.trained_patch

    def watched(before: Any, model: Any, names: Any) -> Patch:
        in_memory.append(model(token_ids(4 * WINDOW)).logits)
        return stored(before, model, names)

    monkeypatch.setattr(tuning, "trained_patch", watched)
    patch = tuned(llama, lines(tmp_path / "data.jsonl"), **EXPORTS[export])
    folder = materialise(overlay(open_folder(llama, label="base"), patch, by="step"), tmp_path / "out")
    model = load(folder, trust=export == "remote-code")
    with torch.no_grad():
        assert (model(token_ids(4 * WINDOW)).logits - in_memory[0]).abs().max() <= 1e-5
        plain = load(llama)(token_ids(4 * WINDOW)).logits
    assert (plain - in_memory[0]).abs().max() > 0.1
    assert patch.metrics["tune"]["changed_tensors"] == len(patch.edits) == len(open_folder(llama, label="").specs)


@pytest.mark.parametrize("export", ["native", "remote-code"])
def test_packed_samples_restart_positions_and_are_separate_ones(export: str, tmp_path: Path) -> None:
    """The loss of a packed sequence is that of its texts read on their own, beyond the window too."""
    from regraft.core.data.batches import collate
    from regraft.core.data.load import load_data
    from regraft.core.training.head import Head

    folder = base(tmp_path / "llama")
    data = lines(tmp_path / "data.jsonl", 4, 30)
    given = params(**EXPORTS[export], tune={"data": {"source": str(data), "pack": True, "max_tokens": 60}})
    assert given.tune is not None
    checkpoint = open_folder(folder, label="base")
    patch = ContextExtension().apply(checkpoint, given.model_copy(update={"tune": None}), Run("step"))
    after = overlay(checkpoint, patch, by="step")
    head = Head.of(model_of(after, Run("step"), patch))
    tokenizer = Run("step").tokenizer(after)
    packed = load_data(given.tune.sequences(64), tokenizer, window=64)
    whole = given.tune.sequences(64).model_copy(update={"pack": False, "max_tokens": 64})
    apart = load_data(whole, tokenizer, window=64)
    assert [list(one.positions) for one in packed.examples] == [[*range(30), *range(30)]] * 2
    assert [len(one) for one in apart.examples] == [30] * 4
    for number, one in enumerate(packed.examples):
        together = head.label_losses(collate([one], (0,))).item()
        single = sum(head.label_losses(collate([apart.examples[2 * number + k]], (0,))).item() for k in (0, 1))
        assert together == pytest.approx(single, rel=1e-5)
    assert tuned(folder, {"source": str(data), "pack": True, "max_tokens": 60}, **EXPORTS[export],
                 tune={"batch_size": 2}).metrics["tune"]["data"]["longest"] == 30  # fmt: skip


def test_longer_samples_are_split_and_each_piece_begins_at_position_0(llama: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl", 4, 150)
    given = params(tune={"data": str(data)}).tune
    assert given is not None
    samples = tuning.read_samples(
        given, Run("step").tokenizer(open_folder(llama, label="base")), window=WINDOW, target=64, seed=0
    )
    assert [len(one) for one in samples.data.examples] == [64, 64, 22] * 4
    assert all(one.positions is None for one in samples.data.examples)
    assert (samples.longest, samples.beyond) == (64, 12)
    kept = params(tune={"data": {"source": str(data), "too_long": "truncate", "max_tokens": 50}}).tune
    assert kept is not None
    settings = kept.sequences(64)
    assert (settings.too_long, settings.max_tokens, settings.restart_positions) == ("truncate", 50, False)


def test_of_chats_answers_alone_are_learnt(tmp_path: Path) -> None:
    """With the model's own template: as many tokens as the answers have, each with what ends the turn."""
    tokenizer = Run("step").tokenizer(open_folder(TINY, label="demo:tiny"))
    answers = ["They went to the city, and found him there.", "And he said unto them, Go."]
    rows = [{"messages": [{"role": "user", "content": "the king went forth " * 80},
                          {"role": "assistant", "content": answer}]} for answer in answers]  # fmt: skip
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    patch = tuned(TINY, data, target_length=1024, tune={"batch_size": 2})
    expected = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1 for answer in answers)
    assert patch.metrics["tune"]["data"]["learnt_tokens"] == expected
    assert patch.metrics["tune"]["data"]["longest"] > 256


@pytest.mark.parametrize("values", [{}, {"export": "remote-code"}], ids=["native", "remote-code"])
def test_six_steps_on_long_text_do_not_make_it_worse(values: dict[str, Any], tmp_path: Path) -> None:
    """demo:tiny four times as far: the loss on its samples after 6 steps, against the extension alone."""
    import torch

    from regraft.core.measures.prose import passage, sentences

    checkpoint = open_folder(TINY, label="demo:tiny")
    tokenizer = Run("step").tokenizer(checkpoint)
    rows = [tokenizer.decode(passage(tokenizer, sentences(Random(seed)), 600)[1:])
            for seed in range(4)]  # fmt: skip
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    patch = tuned(TINY, data, target_length=1024, **values, tune={"epochs": 6, "lr": 2e-4, "micro_batch": 4})
    assert patch.metrics["tune"]["steps"] == 6

    def loss(patch: Patch) -> float:
        model = model_of(overlay(checkpoint, patch, by="step"), Run("step"), patch)
        ids = torch.tensor([tokenizer(row)["input_ids"][:500] for row in rows])
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    plain = ContextExtension().apply(checkpoint, params(target_length=1024, **values), Run("step"))
    assert loss(patch) < loss(plain) - 0.1
    assert patch.notes[-1].startswith("fine-tuned in 6 steps on 4 sequences: loss ")
    assert not any("fine-tunes for 6 steps" in note for note in patch.notes)


def test_at_a_rate_of_0_nothing_is_rewritten(llama: Path, tmp_path: Path) -> None:
    patch = tuned(llama, lines(tmp_path / "data.jsonl"), tune={"lr": 0.0})
    after = overlay(open_folder(llama, label="base"), patch, by="step")
    assert patch.metrics["tune"]["changed_tensors"] == 0
    assert same(weights(llama, patch), weights(llama, Patch()))
    assert set(patch.edits) == set(after.specs)


def test_a_folded_factor_is_trained_where_it_stands(llama: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl")
    fold = ContextExtension().apply(open_folder(llama, label="base"), params(logit_scale=2.0), Run("step"))
    still = tuned(llama, data, logit_scale=2.0, tune={"lr": 0.0})
    assert same(weights(llama, still), weights(llama, fold))
    moved = weights(llama, tuned(llama, data, logit_scale=2.0))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (moved[name] - weights(llama, fold)[name]).abs().max() < 0.05
    assert not same(moved, weights(llama, fold))


def test_a_run_that_was_interrupted_ends_with_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = lines(tmp_path / "data.jsonl", 16)
    whole = weights(llama, tuned(llama, data, Run("step", seed=3)))
    run, steps = Run("step", seed=3, state=tmp_path / "state"), list[int]()

    def stopping(tell: Any) -> Any:
        def listen(progress: Any) -> None:
            steps.append(progress.step)
            if len(steps) == 3:
                raise KeyboardInterrupt

        return listen

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "telling", stopping)
        with pytest.raises(KeyboardInterrupt):
            tuned(llama, data, run)
        resumed = tuned(llama, data, run)
    assert steps == [1, 2, 3, 3, 4]
    assert same(weights(llama, resumed), whole)
    assert not same(weights(llama, tuned(llama, data, Run("step", seed=4))), whole)
    with pytest.raises(UsageError, match="belongs to another training"):
        tuned(llama, data, run, target_length=70)


def test_the_same_run_gives_the_same_metrics_and_no_paths(llama: Path, tmp_path: Path) -> None:
    data = lines(tmp_path / "data.jsonl")
    one, two = tuned(llama, data), tuned(llama, data)
    assert one.metrics == two.metrics
    assert str(tmp_path) not in json.dumps(one.metrics, allow_nan=False)
    assert {name: file.read() for name, file in one.reports.items()} == {
        name: file.read() for name, file in two.reports.items()
    }


def test_the_plan_tells_the_cost(llama: Path, tmp_path: Path) -> None:
    data, step = lines(tmp_path / "data.jsonl"), ContextExtension()
    checkpoint = open_folder(llama, label="base")
    outline = step.plan(checkpoint, params(tune={"data": str(data)}))
    assert set(outline.specs) == set(checkpoint.specs)
    assert outline.notes[-1] == "fine-tunes all weights: 2 epochs of batches of 32, lr 2e-05"
    numbers = sum(spec.numel for spec in checkpoint.specs.values())
    assert outline.workspace_bytes > numbers * 16
    assert outline.scratch_bytes == 2 * numbers * 12
    more = step.plan(checkpoint, params(tune={"data": str(data), "micro_batch": 8}))
    assert more.workspace_bytes > outline.workspace_bytes


def test_tune_and_probe_together(llama: Path, tmp_path: Path) -> None:
    """What is measured afterwards is the tuned model."""
    probe = {"passkey": False, "samples": 1}
    patch = tuned(llama, lines(tmp_path / "data.jsonl"), probe=probe, tune={"lr": 1e-2})
    plain = ContextExtension().apply(open_folder(llama, label="base"), params(probe=probe), Run("step"))
    ours, theirs = patch.metrics["probe"]["entropy"], plain.metrics["probe"]["entropy"]
    assert ours["before"] == theirs["before"]
    assert ours["after"] != theirs["after"]
    assert {"loss.png", "losses.jsonl", "entropy.csv"} <= set(patch.reports)


class TestRefused:
    """What cannot be fine-tuned, before anything is loaded where that is possible."""

    def test_samples_within_the_old_window(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no sample is longer than the window") as raised:
            tuned(llama, lines(tmp_path / "data.jsonl", length=WINDOW))
        assert (raised.value.where, raised.value.found) == ("tune.data", f"at most {WINDOW}")

    def test_short_texts_do_not_become_long_by_packing(self, llama: Path, tmp_path: Path) -> None:
        data = {"source": str(lines(tmp_path / "data.jsonl", 20, 10)), "pack": True}
        with pytest.raises(InputError, match="no sample is longer than the window"):
            tuned(llama, data)
        one_text = tuned(llama, {**data, "restart_positions": False}, tune={"batch_size": 2})
        assert one_text.metrics["tune"]["data"]["longest"] == 4 * WINDOW

    def test_fewer_than_a_batch(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="fewer sequences than a batch"):
            tuned(llama, lines(tmp_path / "data.jsonl", 5), tune={"batch_size": 6})

    def test_preferences(self, llama: Path, tmp_path: Path) -> None:
        data = tmp_path / "pairs.jsonl"
        rows = [{"prompt": "a" * 30, "chosen": "b", "rejected": "c"}] * 8
        data.write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(UsageError, match="preferences"):
            tuned(llama, data)

    def test_a_file_that_is_not_there(self, llama: Path) -> None:
        given = params(tune={"data": "nowhere.jsonl"})
        with pytest.raises(UsageError, match="no such file"):
            ContextExtension().check(open_folder(llama, label="base"), given)

    def test_quantised_weights(self, llama: Path, tmp_path: Path) -> None:
        rewrite_config(llama, {"quantization_config": {"quant_method": "gptq"}})
        given = params(export="abf-only", tune={"data": str(lines(tmp_path / "data.jsonl"))})
        with pytest.raises(Unsupported, match="quantised weights cannot learn"):
            ContextExtension().check(open_folder(llama, label="base"), given)

    @pytest.mark.parametrize(
        ("tune", "message"),
        [
            ({"data": {"source": "x", "max_tokens": 65}}, "beyond target_length"),
            ({"data": {"source": "x", "kind": "preference"}}, "not preferences"),
            ({"data": "x", "lr": -1.0}, "greater than or equal to 0"),
            ({"data": "x", "batch": 3}, "Extra inputs"),
            ({}, "Field required"),
        ],
    )
    def test_settings(self, tune: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            params(tune=tune)
