"""Bad input of steps that train or measure: the documented exit code, one message, no traceback, no target.

The messages are in `snapshots/training/`; read them when they change.
"""

import json
from pathlib import Path

import pytest

from tests.cli.faults import failed
from tests.cli.snapshots import FOLDER, check_snapshot
from tests.plugins.fine_tune.support import pairs, rows, write
from tests.running import done, recipe_text, regraft, tree

CASES = {}
FILE = "data.jsonl"
TUNE = {"use": "fine-tune", "data": FILE, "epochs": 2, "batch_size": 4, "lr": 1e-3}
STEER = {"use": "steer", "positive": "a.txt", "negative": "b.txt", "layers": 1}


def case(code):
    """Register a function that arranges a fault in the recipe `recipe.toml`; it may return options of `apply`."""

    def register(arrange):
        CASES[arrange.__name__] = (arrange, code)
        return arrange

    return register


def recipe(step=TUNE, lines=None, **more):
    """A recipe of one step, with `more` keys (TOML values for tables as text), and its data."""
    if lines is not None:
        write(Path(FILE), lines)
    tables = {key: value[0] for key, value in more.items() if isinstance(value, tuple)}
    plain = {key: value for key, value in {**step, **more}.items() if key not in tables}
    text = recipe_text("base", plain, path="out")
    for key, table in tables.items():
        text = text.replace("[output]", f"{key} = {table}\n[output]")
    Path("recipe.toml").write_text(text)


@case(3)
def empty_data():
    recipe(lines=[])


@case(2)
def missing_data():
    recipe()


@case(2)
def folder_without_data():
    Path("data").mkdir()
    recipe(data="data/")


@case(3)
def data_that_is_not_json():
    recipe()
    Path(FILE).write_text('{"prompt": "1+1=", "completion": "2"}\nprompt: 2+2=\n')


@case(3)
def data_that_is_not_text():
    recipe()
    Path(FILE).write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")


@case(2)
def data_of_an_unknown_format():
    Path("data.docx").write_bytes(b"PK")
    recipe(data="data.docx")


@case(2)
def columns_that_say_nothing():
    recipe(lines=[{"input": "1+1=", "target": "2"}])


@case(2)
def two_columns_for_one_role():
    recipe(lines=[{"prompt": "1+1=", "completion": "2", "answer": "two"}])


@case(3)
def fewer_sequences_than_a_batch():
    recipe(lines=rows(3))


@case(3)
def sequence_longer_than_the_window():
    recipe(lines=[*rows(5), {"prompt": "x" * 126, "completion": "yes"}])


@case(2)
def max_tokens_beyond_the_window():
    recipe(lines=rows(), data=('{ source = "data.jsonl", max_tokens = 129 }',))


@case(3)
def answer_without_tokens():
    recipe(lines=[*rows(5), {"prompt": "1+1=", "completion": "  "}])


@case(3)
def answer_that_is_missing():
    recipe(lines=[*rows(5), {"prompt": "1+1=", "completion": None}])


@case(3)
def answer_that_truncation_cuts_off():
    recipe(
        lines=[*rows(4), {"prompt": "x" * 20, "completion": "yes"}],
        data=('{ source = "data.jsonl", max_tokens = 16, too_long = "truncate" }',),
    )


@case(1)
def chats_without_a_template():
    recipe(lines=[{"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}] * 4)


@case(3)
def more_bad_rows_than_allowed():
    bad = {"prompt": "1+1=", "completion": ""}
    recipe(lines=[*rows(4), bad, bad, bad], data=('{ source = "data.jsonl", max_bad_rows = 2 }',))


@case(2)
def pairs_for_sft():
    recipe(lines=pairs())


@case(2)
def no_pairs_for_dpo():
    recipe(lines=rows(), task="dpo")


@case(1)
def loss_that_is_not_finite():
    recipe(lines=rows(), lr=1e30)


@case(2)
def layer_out_of_range():
    recipe(lines=rows(), select="heads", heads=[[2, 0]])


@case(2)
def head_out_of_range():
    recipe(lines=rows(), select="heads", heads=[[1, 3], [1, 4]])


@case(2)
def head_out_of_range_in_a_file():
    Path("heads.json").write_text(json.dumps({"heads": [[1, 3], [7, 0]]}))
    recipe(lines=rows(), select="heads", heads="heads.json")


@case(3)
def heads_that_are_no_heads():
    Path("heads.json").write_text(json.dumps({"heads": [[1, 3], [1, "all"]]}))
    recipe(lines=rows(), select="heads", heads="heads.json")


@case(2)
def select_without_its_key():
    recipe(lines=rows(), select="heads")


@case(2)
def key_of_another_task():
    recipe(lines=rows(), beta=0.5)


@case(2)
def unknown_option_of_the_training():
    recipe(lines=rows(), train=("{ weight_deacy = 0.1 }",))


@case(2)
def names_that_no_tensor_has():
    recipe(lines=rows(), select="names", names=["*.mlp.*", "model.layers.0.self_attn.q_porj.weight"])


@case(1)
def bfloat16_where_it_is_slow():
    recipe(lines=rows(), train=('{ precision = "bfloat16" }',))


@case(4)
def log_in_a_place_that_is_a_file():
    Path("taken").write_text("")
    recipe(lines=rows(), log="taken/log.jsonl")


@case(2)
def prompts_that_are_not_there():
    recipe(STEER)


@case(3)
def prompts_without_a_line():
    Path("a.txt").write_text("\n\n")
    Path("b.txt").write_text("no\n")
    recipe(STEER)


@case(1)
def prompts_that_do_not_differ():
    Path("a.txt").write_text("yes\n")
    Path("b.txt").write_text("yes\n")
    recipe(STEER)


@case(2)
def neither_vectors_nor_prompts():
    recipe({"use": "steer", "strength": 2.0})


@case(2)
def vectors_and_prompts():
    recipe(STEER, vectors="v.safetensors")


@case(2)
def layers_that_are_none():
    recipe(STEER, layers="1..3")


@pytest.mark.parametrize("name", CASES)
def test_bad_training(name, workplace, monkeypatch):
    monkeypatch.setattr("regraft.core.training.modes.bf16_is_fast", lambda device: False)
    arrange, code = CASES[name]
    arrange()
    before = tree(workplace)
    ran = regraft("apply", "recipe.toml")
    failed_in_a_run(ran, code)
    kept = {path: digest for path, digest in tree(workplace).items() if not path.startswith(".out.regraft")}
    assert kept == before, "nothing but what a training may go on from"
    if code != 2:
        assert "\n  remedy: " in ran.err
    check_snapshot(f"training/{name}", error_of(ran), workplace)


@pytest.mark.parametrize(
    ("family", "site"), [("qwen3", "mlp_out"), ("mixtral", "residual"), ("gemma2", "residual"), ("glm4", "attn_out")]
)
def test_a_model_that_cannot_take_up_a_vector(family, site, workplace, tiny_folder):
    Path("a.txt").write_text("yes\n")
    Path("b.txt").write_text("no\n")
    Path("recipe.toml").write_text(recipe_text(tiny_folder(family), {**STEER, "site": site}, path="out"))
    ran = regraft("apply", "recipe.toml")
    failed(ran, 1)
    assert "\n  remedy: " in ran.err
    check_snapshot(f"training/{family}_without_{site}", ran.err, workplace)


def test_out_of_memory(workplace, monkeypatch):
    import torch

    def starving(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    recipe(lines=rows())
    monkeypatch.setattr("regraft.core.training.objectives.CrossEntropy.__call__", starving)
    ran = regraft("apply", "recipe.toml")
    failed_in_a_run(ran, 4)
    assert not Path("out").exists()
    check_snapshot("training/out_of_memory", error_of(ran), workplace)


def test_saved_states(workplace, monkeypatch):
    """A state of another recipe, and a damaged one; both say how to begin anew, and that works."""
    from tests.core.training.test_resume import Killed

    recipe(lines=rows(), train=("{ save_every = 1 }",))
    with monkeypatch.context() as patched:
        patched.setattr("regraft.plugins.fine_tune.fit.telling", _killing)
        with pytest.raises(Killed):
            regraft("apply", "recipe.toml")
    ran = regraft("apply", "recipe.toml", "--set", "fine-tune.lr=0.1", "--set", "fine-tune.epochs=3")
    failed_in_a_run(ran, 2)
    check_snapshot("training/state_of_another_recipe", error_of(ran), workplace)
    (facts,) = Path().rglob("state.json")
    facts.write_text(facts.read_text()[:100])
    ran = regraft("apply", "recipe.toml")
    failed_in_a_run(ran, 3)
    check_snapshot("training/damaged_state", error_of(ran), workplace)
    assert not Path("out").exists()
    done("apply", "recipe.toml", "--restart")


def _killing(tell):
    from tests.core.training.test_resume import Killed

    def listen(progress):
        if progress.step == 2:
            raise Killed

    return listen


def error_of(ran):
    """The message, without the lines of progress before it."""
    return ran.err[ran.err.index("error: ") :]


def failed_in_a_run(ran, code):
    """As `failed`, where lines of progress may come first."""
    progress = ran.err[: ran.err.index("error: ")]
    assert "rror" not in progress
    failed(type(ran)(ran.code, ran.out, error_of(ran)), code)


def test_no_snapshot_is_left_over():
    more = {"out_of_memory", "state_of_another_recipe", "damaged_state", "qwen3_without_mlp_out"}
    more |= {"mixtral_without_residual", "gemma2_without_residual", "glm4_without_attn_out"}
    assert {path.stem for path in (FOLDER / "training").glob("*.txt")} == {*CASES, *more}
