"""The search on a planted model in which the sink of one head alone hurts, and what it refuses."""

import json
import random
from pathlib import Path

import pytest
import torch

from regraft.core.errors import RegraftError, Unsupported, UsageError
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.attention_calibration.search import pass_sizes
from tests.families import save_tiny, save_tokenizer, tiny
from tests.plugins.attention_calibration.support import calibrate, load
from tests.running import done, regraft, tree, write_recipe

HURTS, HELPS, IDLE = (2, 1), (3, 0), (2, 3)
TAU = 0.35
"""Above what an early key has of heads that look at all keys alike, below what `#` has of the planted ones."""

REPORTED = {"regraft", *(f"regraft/attention-calibration{name}" for name in ("", "/heads.json", "/sinks-before.png"))}

LETTERS = "abcd"
WIDTH, HEAD = 128, 32
SCALE = WIDTH / HEAD**0.5
"""Of a score: a one-hot token has the length √128 behind its norm."""


def token(character: str) -> int:
    """Its id in the tokenizer of the tiny models."""
    return 4 if character == " " else 5 + ord(character) - 33


def plant(folder: Path) -> Path:
    """Every token is a direction of its own, and three heads of one kind are all that does anything.

    Every row of theirs looks at `#`, and the `?` at the letter a to d that stands somewhere before it. Head `HURTS`
    says the letter it sees, and `a` louder, for the `#`. Head `HELPS` says against `a` by its `#`. Head `IDLE` is mute.
    """
    model = tiny("llama", hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                 rope_parameters={"rope_type": "default", "rope_theta": 1e9}, tie_word_embeddings=False)  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.eye(WIDTH) if "embed" in name or "lm_head" in name else torch.zeros_like(parameter))
            if "norm" in name:
                parameter.fill_(1.0)
        for layer, head in (HURTS, HELPS, IDLE):
            attention = model.model.layers[layer].self_attn
            row = head * HEAD
            attention.q_proj.weight[row + 15] = 1.0
            attention.q_proj.weight[row + 14, token("?")] = 1.0
            attention.k_proj.weight[row + 15, token("#")] = 4.5 / SCALE
            for number, letter in enumerate(LETTERS):
                attention.k_proj.weight[row + 14, token(letter)] = 3.8 / SCALE
                attention.v_proj.weight[row + 1 + number, token(letter)] = 0.1
                attention.o_proj.weight[token(letter), row + 1 + number] = float((layer, head) == HURTS)
            attention.v_proj.weight[row, token("#")] = 0.1
            attention.o_proj.weight[token("a"), row] = {HURTS: 1.0, HELPS: -0.1}.get((layer, head), 0.0)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_questions(path: Path, count: int = 24, *, seed: int = 0) -> Path:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        letter = draw.choice(LETTERS)
        text = [draw.choice("mnopq") for _ in range(draw.randrange(14, 18))]
        text[draw.randrange(4, 9)] = letter
        rows.append({"prompt": f".#{''.join(text)}?", "options": list(LETTERS), "answer": letter})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("planted")
    return plant(folder / "base"), write_questions(folder / "questions.jsonl")


def table(patch) -> dict:
    return json.loads(patch.reports["heads.json"].read())


def test_the_one_head_whose_sink_hurts_is_found(planted, tmp_path):
    """Alone, whatever is judged; the others have sinks too, and are not chosen. Its table is read back."""
    base, questions = planted
    for score in ("log-prob", "accuracy"):
        patch = calibrate(base, data=questions, tau=TAU, score=score)
        assert patch.metrics["heads"] == table(patch)["heads"] == [list(HURTS)]
        assert (patch.metrics["tried"], patch.metrics["without_sinks"]) == (3, 5)
        for split in ("search", "held_out"):
            assert patch.metrics[split]["accuracy"]["before"] < 0.5 < patch.metrics[split]["accuracy"]["after"] == 1
        assert patch.metrics["search"]["questions"] + patch.metrics["held_out"]["questions"] == 24
    assert {"sinks-before.png", "sinks-after.png"} < set(patch.reports)
    (tmp_path / "heads.json").write_bytes(patch.reports["heads.json"].read())
    again = calibrate(base, heads=tmp_path / "heads.json", tau=TAU)
    assert {name: file.read() for name, file in again.files.items()} == {
        name: file.read() for name, file in patch.files.items()
    }
    assert again.json == patch.json


def test_the_same_seed_gives_the_same_report_and_batches_do_not_matter(planted):
    base, questions = planted
    one, two, other = (calibrate(base, data=questions, tau=TAU, passes=1, batch_size=size) for size in (8, 8, 5))
    assert {name: file.read() for name, file in one.reports.items()} == {
        name: file.read() for name, file in two.reports.items()
    }
    assert table(other)["heads"] == [list(HURTS)]
    assert other.metrics["gains"]["2.1"] == pytest.approx(one.metrics["gains"]["2.1"], rel=1e-4)


class Killed(Exception):
    pass


def test_a_search_that_was_killed_goes_on(planted, tmp_path):
    """What it had told is not computed again, and the result is the same; another search's state is refused."""
    base, questions = planted
    said: list[str] = []

    def tell(line: str) -> None:
        said.append(line)
        if sum("in this pass" in one for one in said) == 4:
            raise Killed

    with pytest.raises(Killed):
        calibrate(base, Run("act", tell=tell, state=tmp_path / "state"), data=questions, tau=TAU)
    assert "s left in this pass" in said[-1]
    later: list[str] = []
    resumed = calibrate(base, Run("act", tell=later.append, state=tmp_path / "state"), data=questions, tau=TAU)
    whole: list[str] = []
    fresh = calibrate(base, Run("act", tell=whole.append), data=questions, tau=TAU)
    steps = [sum("in this pass" in one for one in lines) for lines in (said, later, whole)]
    assert steps[0] + steps[1] == steps[2]
    assert resumed.metrics == fresh.metrics
    with pytest.raises(UsageError, match="belongs to another search"):
        calibrate(base, Run("act", state=tmp_path / "state"), data=questions, tau=TAU, beta=0.3)


def test_the_sizes_of_passes():
    assert pass_sizes(100, 3) == [25, 50, 100]
    assert pass_sizes(20, 3) == [8, 10, 20]
    assert pass_sizes(5, 2) == [5, 5]


def refused(kind: type[RegraftError], reason: str, base: Path, **values: object) -> RegraftError:
    with pytest.raises(kind) as caught:
        calibrate(base, **values)
    assert reason in str(caught.value)
    assert caught.value.remedy
    return caught.value


def contrary_to(questions: Path, path: Path) -> Path:
    """The same questions with other answers."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows = [{**row, "answer": "a" if number else "b"} for number, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_where_no_head_is_worth_it_the_output_is_the_base_and_says_so(planted, tmp_path, monkeypatch):
    """Exit code 0, every file of the base as it was, no code, and the reason in plan, summary, card and lock file."""
    base, questions = planted
    monkeypatch.chdir(tmp_path)
    contrary = contrary_to(questions, tmp_path / "contrary.jsonl")
    cases = [
        ({"tau": 0.99}, "none has an attention sink on these questions"),
        ({"tau": TAU, "layers": "3-"}, "each alone, none gains more than min_gain"),
        ({"tau": TAU, "held_out": str(contrary)}, "do not help on the questions held out"),
    ]
    for number, (values, reason) in enumerate(cases):
        step = {"use": "attention-calibration", "data": str(questions), **values}
        write_recipe(Path("recipe.toml"), base, step, path=f"out{number}")
        plan = done("plan", "recipe.toml")
        assert "if no head is worth calibrating, nothing changes" in plan.out
        assert "act (known after the run)" in plan.out
        ran, out = done("apply", "recipe.toml", "--save-patches", f"patches{number}"), Path(f"out{number}")
        said = "no head is worth calibrating: "
        assert said in ran.out
        assert f"{reason}" in ran.out
        assert "the output is the base, unchanged" in ran.out
        assert "trust_remote_code" not in ran.out
        assert said in (out / "README.md").read_text()
        written, kept = tree(out), tree(base)
        assert {name: written[name] for name in kept} == kept
        assert not list(out.glob("*.py"))
        assert set(written) - set(kept) == {"README.md", "regraft.lock.json", *REPORTED}
        metrics = json.loads((out / "regraft.lock.json").read_text())["steps"][0]["metrics"]
        assert metrics["heads"] == []
        assert reason in metrics["reason"]
        assert metrics["search"]["accuracy"]["before"] == metrics["search"]["accuracy"]["after"]
    load(Path("out0"), trust_remote_code=False)
    write_recipe(Path("again.toml"), base, {"use": "patch", "path": "patches0/attention-calibration.regraft"},
                 path="again")  # fmt: skip
    done("apply", "again.toml")
    assert {name: tree(Path("again"))[name] for name in kept} == kept


def one_class(questions, file):
    lines = questions.read_text().splitlines()
    file.write_text("\n".join(json.dumps({**json.loads(line), "answer": "a"}) for line in lines))
    return {"data": str(file)}


def too_few(questions, file):
    file.write_text("\n".join(questions.read_text().splitlines()[:6]))
    return {"data": str(file)}


def table_of_another_model(questions, file):
    file.write_text(json.dumps({"heads": [[2, 1]], "num_layers": 30, "num_heads": 9}))
    return {"heads": str(file)}


def table_without_heads(questions, file):
    file.write_text(json.dumps({"heads": []}))
    return {"heads": str(file)}


BAD_INPUT = [
    (one_class, 3, "every row has the same options and the same answer"),
    (too_few, 3, "too few questions"),
    (table_of_another_model, 2, "a model of another shape"),
    (table_without_heads, 3, "the file names no heads"),
    (lambda questions, file: {"heads": [[2, 4]]}, 2, "there is no head 4 of layer 2"),
    (lambda questions, file: {"heads": [[2, 1], [2, 1]]}, 2, "a head is named twice"),
    (lambda questions, file: {}, 2, "either heads, or data"),
    (lambda questions, file: {"heads": [[2, 1]], "layers": 2}, 2, "for the search alone"),
]


@pytest.mark.parametrize(("values", "code", "reason"), BAD_INPUT, ids=[reason for *_, reason in BAD_INPUT])
def test_bad_input_is_refused_in_clear_words_and_writes_nothing(planted, tmp_path, monkeypatch, values, code, reason):
    base, questions = planted
    monkeypatch.chdir(tmp_path)
    step = {"use": "attention-calibration", **values(questions, tmp_path / "file.jsonl")}
    write_recipe(Path("recipe.toml"), base, step, path="out")
    before = tree(tmp_path)
    ran = regraft("apply", "recipe.toml")
    assert ran.code == code
    assert reason in ran.err
    assert ("remedy: " in ran.err) != ("recipe.toml:" in ran.err)  # a fault of the recipe has its place instead
    assert "Traceback" not in ran.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("falcon", {}, "the attention of this family cannot be calibrated"),
        ("mistral", {"sliding_window": 16}, "has a sliding window"),
        ("gemma2", {}, "layer 0 has a sliding window"),
    ],
)
def test_models_that_cannot_be_calibrated_are_refused(tmp_path, family, overrides, reason):
    base = save_tiny(family, tmp_path / family, **overrides)
    assert family in str(open_folder(base, label="base").config["model_type"])
    error = refused(Unsupported, reason, base, heads=[[0, 1]])
    assert family != "falcon" or error.found == "falcon"
