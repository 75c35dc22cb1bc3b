"""Training as a step of a recipe: tasks, selections, reports, interruptions."""

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.interpolate import interpolate
from regraft.core.transformation import Run
from regraft.plugins.fine_tune import FineTune
from regraft.plugins.fine_tune.params import FineTuneParams
from tests.checkpoints import same_bits, write_checkpoint
from tests.core.training.test_resume import Killed
from tests.helpers import run_python
from tests.materialise import materialise
from tests.plugins.fine_tune.support import loaded, pairs, params, rows, texts, tune, write
from tests.running import done, recipe_text, regraft


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "sums.jsonl", rows())


def changed(checkpoint, result):
    return {name for name in checkpoint.specs if result.raw(name) != checkpoint.raw(name)}


def test_answers_are_learnt(tiny_folder, sums):
    checkpoint, patch, result = tune(tiny_folder(), data=sums, held_out=sums, steps=24, epochs=24)
    held_out = patch.metrics["held_out"]
    assert held_out["loss_after"] < 0.5 * held_out["loss_before"]
    assert changed(checkpoint, result) == set(checkpoint.specs)
    facts = patch.metrics["data"]
    answers = sum(len(str(2 * n)) + 1 for n in range(16))  # and the end token
    assert facts["learnt_tokens"] == answers
    assert (patch.metrics["task"], patch.metrics["steps"], patch.metrics["strength"]) == ("sft", 24, 1.0)
    lines = [json.loads(line) for line in patch.reports["losses.jsonl"].read().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 25))
    assert set(patch.reports) == {"loss.png", "losses.jsonl"}
    assert patch.reports["loss.png"].read().startswith(b"\x89PNG")
    assert patch.notes[0] == "21 tensors: 78144 of 78144 numbers learn"
    assert str(sums) not in json.dumps(patch.metrics)


def test_every_token_of_a_text_is_learnt(tiny_folder, sums, tmp_path):
    _, patch, _ = tune(tiny_folder(), data=sums, task="text")
    every = patch.metrics["data"]
    assert every["learnt_tokens"] == every["tokens"] - every["sequences"], "all but the first of each"
    packed = {"source": str(write(tmp_path / "t.jsonl", texts())), "pack": True, "max_tokens": 32}
    _, patch, _ = tune(tiny_folder(), data=packed, task="text", batch_size=2)
    assert patch.metrics["data"]["tokens"] == 32 * patch.metrics["data"]["sequences"]


def test_preferences_are_learnt(tiny_folder, tmp_path):
    """Oracle 11: at the start the model is the reference, and the loss is ln 2."""
    data = write(tmp_path / "pairs.jsonl", pairs())
    _, patch, _ = tune(tiny_folder(), data=data, held_out=data, task="dpo", steps=8, epochs=8, lr=1e-3, micro_batch=2)
    assert patch.metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert patch.metrics["held_out"]["loss_before"] == pytest.approx(math.log(2), abs=1e-6)
    assert patch.metrics["held_out"]["loss_after"] < 0.5 * math.log(2)
    _, none, _ = tune(tiny_folder(), data=data, task="dpo", lr=0.0)
    losses = [json.loads(line)["loss"] for line in none.reports["losses.jsonl"].read().splitlines()]
    assert losses == pytest.approx([math.log(2)] * 4, abs=1e-6), "the loss is the mean over pairs"


def test_one_step_of_adam_in_closed_form(tiny_folder, sums):
    """The first step of Adam moves every weight by the rate, against the sign of its gradient."""
    name = "model.layers.0.mlp.up_proj.weight"
    values = {"select": "names", "names": [name], "steps": 1, "lr": 1e-3, "train": {"schedule": "constant"}}
    checkpoint, _, result = tune(tiny_folder(), data=sums, **values)
    moved = (result.load(name) - checkpoint.load(name)).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=2e-2, atol=1e-8)
    _, _, half = tune(tiny_folder(), data=sums, **values, strength=0.5)
    assert torch.equal(half.load(name), interpolate(checkpoint.load(name), result.load(name), 0.5))
    checkpoint, patch, same = tune(tiny_folder(), data=sums, **values, strength=0.0)
    assert changed(checkpoint, same) == set()
    assert patch.metrics["changed_tensors"] == 0
    _, _, average = tune(tiny_folder(), data=sums, **values, ema=0.75)
    expected = interpolate(checkpoint.load(name), result.load(name), 0.25)
    torch.testing.assert_close(average.load(name), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("family", "patterns", "expected"),
    [
        ("llama", ["*norm*"], lambda name: "norm" in name),
        ("llama", ["model.layers.1.*", "lm_head.weight"], lambda name: "layers.1." in name or "lm_head" in name),
        ("gpt2", ["*.h.?.mlp.c_fc.*"], lambda name: "c_fc" in name),
        ("qwen2-tied", ["model.embed_tokens.weight"], lambda name: "embed_tokens" in name),
        ("mixtral", ["*.layers.0.*.experts.*"], lambda name: "layers.0." in name and "experts" in name),
        ("gemma3", ["*language_model*mlp*"], lambda name: "language_model" in name and ".mlp." in name),
    ],
)
def test_named_tensors_alone(family, patterns, expected, tiny_folder, sums):
    checkpoint, patch, result = tune(tiny_folder(family), data=sums, select="names", names=patterns)
    names = {name for name in checkpoint.specs if expected(name)}
    assert names
    assert set(patch.edits) == names
    assert changed(checkpoint, result) == names


def test_a_tied_head_that_is_stored_follows_its_embedding(tiny_folder, sums, tmp_path):
    base = open_checkpoint(tiny_folder("qwen2-tied"))
    tensors = loaded(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    folder = write_checkpoint(tmp_path / "both", tensors, config=dict(base.config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(base.files[name].read())
    both = ["model.embed_tokens.weight", "lm_head.weight"]
    _, _, result = tune(folder, data=sums, select="names", names=both)
    assert torch.equal(result.load(both[0]), result.load(both[1]))
    _, _, result = tune(folder, data=sums)
    assert torch.equal(result.load(both[0]), result.load(both[1]))
    with pytest.raises(Unsupported, match="no parameter of the model") as caught:
        tune(folder, data=sums, select="names", names=["lm_head.weight"])
    assert caught.value.found == "tied to model.embed_tokens.weight"


def test_some_experts_of_one_parameter(tiny_folder, sums):
    with pytest.raises(Unsupported, match="together or not at all"):
        tune(tiny_folder("mixtral"), data=sums, select="names", names=["*.experts.0.*"])


def test_the_same_seed_gives_the_same_bytes_whatever_the_pieces(tiny_folder, sums):
    _, patch, first = tune(tiny_folder(), data=sums)
    _, again, second = tune(tiny_folder(), data=sums)
    assert same_bits(loaded(first), loaded(second))
    assert {name: file.read() for name, file in patch.reports.items()} == {
        name: file.read() for name, file in again.reports.items()
    }
    _, _, pieces = tune(tiny_folder(), data=sums, micro_batch=1)
    for name, tensor in loaded(first).items():
        torch.testing.assert_close(pieces.load(name), tensor, rtol=1e-3, atol=1e-4)


def test_options_reach_the_loop(tiny_folder, sums, tmp_path):
    train = {"schedule": "constant", "warmup_steps": 2, "shuffle": False, "drop_last": False, "log_every": 2}
    values = {"batch_size": 10, "epochs": 2, "steps": None, "train": train, "log": tmp_path / "log.jsonl"}
    tune(tiny_folder(), data=sums, **{key: value for key, value in values.items() if value is not None})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4], "16 sequences by 10: two steps an epoch, the second one of 6"
    assert [line["lr"] for line in lines] == [1e-2, 1e-2]
    _, patch, _ = tune(tiny_folder(), data=sums, train={"stop_loss": 100.0, "stop_window": 1})
    assert (patch.metrics["steps"], patch.metrics["stopped"]) == (1, "stop_loss")
    assert "stopped by stop_loss" in patch.notes[1]


def test_defaults():
    given = FineTuneParams.model_validate({"data": "x.jsonl"})
    assert (given.rate, given.train.schedule, given.train.weight_decay, given.epochs) == (1e-5, "linear", 0.0, 1)
    assert FineTuneParams.model_validate({"data": "x.jsonl", "task": "dpo"}).rate == 1e-6
    assert FineTuneParams.model_validate({"data": "x.jsonl", "task": "dpo", "lr": 0.0}).rate == 0.0


BAD = {
    "heads without select": ({"heads": [[0, 1]]}, 'heads is for select = "heads"'),
    "kv without heads": ({"kv": True}, 'kv is for select = "heads"'),
    "select without heads": ({"select": "heads"}, 'select = "heads" needs `heads`'),
    "select without names": ({"select": "names"}, 'select = "names" needs `names`'),
    "no heads": ({"select": "heads", "heads": []}, "heads"),
    "a head of three numbers": ({"select": "heads", "heads": [[1, 2, 3]]}, "heads"),
    "beta of sft": ({"beta": 0.5}, 'beta is for task = "dpo"'),
    "learn all of sft": ({"data": {"source": "x", "learn": "all"}}, 'data.learn contradicts task = "sft"'),
    "learn answers of texts": (
        {"held_out": {"source": "x", "learn": "answer"}, "task": "text"}, "held_out.learn contradicts"),
    "an option that is a key": ({"train": {"lr": 1e-3}}, "train.lr"),
    "a negative rate": ({"lr": -1.0}, "lr"),
    "no steps": ({"steps": 0}, "steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters(case):
    values, words = BAD[case]
    with pytest.raises(ValidationError, match=words):
        FineTuneParams.model_validate_json(json.dumps({"data": "x.jsonl", **values}), strict=True)


def test_bad_data(tiny_folder, sums, tmp_path):
    preferences = write(tmp_path / "pairs.jsonl", pairs())
    with pytest.raises(UsageError, match="another kind than the task") as caught:
        tune(tiny_folder(), data=preferences)
    assert caught.value.remedy == 'set task = "dpo"'
    with pytest.raises(UsageError, match="another kind than the task"):
        tune(tiny_folder(), data=sums, task="dpo")
    with pytest.raises(UsageError, match="no tensor has such a name") as caught:
        tune(tiny_folder(), data=sums, select="names", names=["model.norm.wieght"])
    assert caught.value.remedy == 'did you mean "model.norm.weight"?'
    with pytest.raises(UsageError, match="longer than the model's window"):
        FineTune().check(open_checkpoint(tiny_folder()), params(data={"source": str(sums), "max_tokens": 129}))
    with pytest.raises(InputError, match="fewer sequences than a batch"):
        tune(tiny_folder(), data=sums, batch_size=17)


def test_code_of_the_checkpoint_is_not_passed_over(tiny_folder, sums, tmp_path):
    base = materialise(open_checkpoint(tiny_folder()), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "other.Model"}}))
    with pytest.raises(Unsupported, match="Python code of the checkpoint"):
        tune(base, data=sums)


def killing(monkeypatch, step):
    """The listener of the loop ends the process at a step."""

    def telling(tell):
        def listen(progress):
            if progress.step == step:
                raise Killed

        return listen

    monkeypatch.setattr("regraft.plugins.fine_tune.fit.telling", telling)


@pytest.mark.parametrize("values", [{}, {"select": "heads", "heads": [[0, 1]]}, {"task": "dpo"}], ids=str)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(values, tiny_folder, tmp_path, monkeypatch):
    made = pairs() if values.get("task") == "dpo" else rows()
    values = {**values, "data": write(tmp_path / "data.jsonl", made), "train": {"save_every": 1}}
    _, expected, whole = tune(tiny_folder(), **values)
    with monkeypatch.context() as patched:
        killing(patched, 2)
        with pytest.raises(Killed):
            tune(tiny_folder(), state=tmp_path / "state", **values)
    _, patch, resumed = tune(tiny_folder(), state=tmp_path / "state", **values)
    assert same_bits(loaded(resumed), loaded(whole))
    assert patch.metrics == expected.metrics
    assert patch.reports["losses.jsonl"].read() == expected.reports["losses.jsonl"].read()


def test_a_plan_imports_no_torch(tiny_folder, sums):
    program = """
        import json, sys
        from regraft.core.sources.open import open_checkpoint
        from regraft.plugins.fine_tune import FineTune
        step, checkpoint = FineTune(), open_checkpoint(sys.argv[1])
        params = step.Params.model_validate_json(sys.argv[2])
        step.check(checkpoint, params)
        print(step.plan(checkpoint, params).notes[0])
        print(sorted({"torch", "transformers", "matplotlib"} & set(sys.modules)))
    """
    given = {"data": str(sums), "select": "heads", "heads": [[0, 1]]}
    lines = run_python(program, tiny_folder(), json.dumps(given)).splitlines()
    assert lines == ["1 head in 1 layer: 2048 of 78144 numbers learn", "[]"]


STEP = {"use": "fine-tune", "data": "sums.jsonl", "lr": 1e-2, "epochs": 2, "batch_size": 4,
        "select": "names", "names": ["*.mlp.*"]}  # fmt: skip


def test_two_steps_in_one_apply(workplace, monkeypatch):
    """The second step trains what the first one made; a chain is one read, one write, and two reports."""
    write(Path("sums.jsonl"), rows())
    write(Path("pairs.jsonl"), pairs())
    second = {"id": "prefer", "use": "fine-tune", "data": "pairs.jsonl", "task": "dpo", "lr": 1e-3}
    text = recipe_text("base", STEP, second, path="out")
    text = text.replace('"prefer"', '"prefer"\nselect = "heads"\nheads = [[1, 0]]')
    Path("recipe.toml").write_text(text)
    planned = done("plan", "recipe.toml").out
    assert "tensors: 13 copied, 8 rewritten, 0 added, 0 dropped" in planned
    assert "1 head in 1 layer: 2048 of 78144 numbers learn" in planned
    ran = done("apply", "recipe.toml", "--verify", "load")
    assert "6 tensors: 36864 of 78144 numbers learn" in ran.out
    lock = json.loads(Path("out", "regraft.lock.json").read_text())
    first, last = (step["metrics"] for step in lock["steps"])
    assert last["first_loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert last["trained_tensors"] == 2
    assert {path.name for path in Path("out", "regraft", "prefer").iterdir()} == {"loss.png", "losses.jsonl"}
    base, result = open_checkpoint("base"), open_checkpoint("out")
    moved = {name for name in base.specs if not torch.equal(base.load(name), result.load(name))}
    slices = {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qo"}
    assert moved == slices | {name for name in base.specs if ".mlp." in name}
    alone, run = FineTune(), Run("fine-tune")
    given = FineTuneParams.model_validate({**{k: v for k, v in STEP.items() if k != "use"}, "names": ("*.mlp.*",)})
    patch = alone.apply(base, given, run)
    assert patch.metrics["final_loss"] == first["final_loss"]
    middle = overlay(base, patch, by="fine-tune")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(middle.load(name), result.load(name)), "the second step left what it did not select"


def test_resume_with_a_changed_recipe_is_refused(workplace, monkeypatch):
    write(Path("sums.jsonl"), rows())
    Path("recipe.toml").write_text(recipe_text("base", STEP, path="out"))
    with monkeypatch.context() as patched:
        killing(patched, 3)
        with pytest.raises(Killed):
            regraft("apply", "recipe.toml", "--set", "fine-tune.train.save_every=1")
    ran = regraft("apply", "recipe.toml", "--set", "fine-tune.lr=0.5")
    assert ran.code == 2
    assert "belongs to another training" in ran.err
    assert "settings.lr was 0.01 and is 0.5" in ran.err
    assert not Path("out").exists()
    done("apply", "recipe.toml")
    resumed = Path("out", "model-00001-of-00006.safetensors").read_bytes()
    done("apply", "recipe.toml", "--output", "fresh")
    assert Path("fresh", "model-00001-of-00006.safetensors").read_bytes() == resumed


def test_on_the_demo_model(tmp_path, monkeypatch):
    """Chats through the model's own template, from the first command to a checkpoint that loads and has learnt."""
    monkeypatch.chdir(tmp_path)
    names = ["Ruth", "Boaz", "Naomi", "Moses", "Aaron", "Miriam", "Joshua", "Caleb"]
    chats = [
        {"messages": [{"role": "user", "content": f"What did they call {name}?"},
                      {"role": "assistant", "content": f"They called {name} {other}."}]}
        for name, other in zip(names, names[1:] + names[:1], strict=True)
    ]  # fmt: skip
    write(Path("chats.jsonl"), chats)
    step = {"use": "fine-tune", "data": "chats.jsonl", "held_out": "chats.jsonl", "lr": 2e-3, "epochs": 6,
            "batch_size": 4}  # fmt: skip
    Path("recipe.toml").write_text(recipe_text("demo:tiny", step, path="out"))
    ran = done("apply", "recipe.toml", "--verify", "forward")
    facts = json.loads(Path("out", "regraft.lock.json").read_text())["steps"][0]["metrics"]
    assert facts["held_out"]["loss_after"] < 0.5 * facts["held_out"]["loss_before"]
    assert facts["steps"] == 12
    assert facts["data"]["files"].keys() == {"chats.jsonl"}
    assert "verified: forward" in ran.out
    assert "held-out loss" in Path("out", "README.md").read_text()
