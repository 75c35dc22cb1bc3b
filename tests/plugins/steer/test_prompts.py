"""Prompts from files, chats and the recipe; and what a recipe may say."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from regraft.core.errors import InputError, UsageError
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.steer.params import PromptSettings, SteerParams
from regraft.plugins.steer.prompts import answer_ids, read_prompts
from tests.helpers import run_python
from tests.running import recipe_text, regraft


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return Run("x").tokenizer(open_checkpoint(tiny_folder()))


def read(tokenizer, settings, window=64):
    return read_prompts(PromptSettings(**settings), tokenizer, key="positive", window=window, seed=0)


def texts(tokenizer, found):
    return [tokenizer.decode(ids) for ids in found.ids]


def test_lines_rows_and_texts(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    rows = [{"prompt": "p"}, {"prompt": "q"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.csv").write_text("question,answer\nWhat?, this\n")
    found = read(tokenizer, {"source": tuple(str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.csv"))})
    assert texts(tokenizer, found) == ["one", "two words", "p", "q", "What? this"]
    assert (found.rows, found.bad) == (5, 0)
    assert set(found.summary()["files"]) == {"a.txt", "b.jsonl", "c.csv"}
    assert str(tmp_path) not in json.dumps(found.summary())
    assert texts(tokenizer, read(tokenizer, {"prompts": ("x", "y z")})) == ["x", "y z"]
    whole = {"source": str(tmp_path / "a.txt"), "text_unit": "file"}
    assert texts(tokenizer, read(tokenizer, whole)) == ["one\n\ntwo words\n".replace("\n", "<unk>")]
    drawn = read(tokenizer, {"source": str(tmp_path / "a.txt"), "max_rows": 1})
    assert len(drawn.ids) == 1


def test_one_side_of_preference_pairs(tokenizer, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "Q", "chosen": "yes", "rejected": "no"}) + "\n")
    with pytest.raises(UsageError, match="a pair of answers is not one prompt") as caught:
        read(tokenizer, {"source": str(data)})
    assert 'columns = { completion = "chosen" }' in caught.value.remedy
    for side, text in (("chosen", "Qyes"), ("rejected", "Qno")):
        settings = {"source": str(data), "kind": "completion", "columns": {"completion": side}}
        assert texts(tokenizer, read(tokenizer, settings)) == [text]


def test_chats_end_where_the_answer_begins(tmp_path):
    demo = Run("x").tokenizer(open_checkpoint("demo:tiny"))
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in ([user], [user, answer])))
    asked, answered = texts(demo, read(demo, {"source": str(tmp_path / "chat.jsonl")}))
    assert asked.endswith("<|assistant|>")
    assert answered.startswith(asked + "Yes")


def test_an_end_that_the_tokenizer_adds_is_not_the_last_token(tokenizer):
    class Ending:
        eos_token_id = 2

        def __call__(self, text, *, add_special_tokens, verbose):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    found = read(Ending(), {"prompts": ("ab", "c</s>")})
    plain = tokenizer("ab")["input_ids"]
    assert found.ids[0] == [1, *plain]
    assert found.ids[1][-1] == 2, "the text itself ends so"


@pytest.mark.parametrize(
    ("lines", "settings", "words"),
    [
        ("", {}, "there are no prompts"),
        ("a" * 20 + "\n", {"max_tokens": 19}, "has 20 tokens"),
        ("a" * 65 + "\n", {}, "has 65 tokens"),
    ],
)
def test_no_use(tokenizer, tmp_path, lines, settings, words):
    (tmp_path / "p.txt").write_text(lines)
    with pytest.raises(InputError, match=words) as caught:
        read(tokenizer, {"source": str(tmp_path / "p.txt"), **settings})
    assert caught.value.remedy
    assert "p.txt" in caught.value.where
    if lines:
        (tmp_path / "p.txt").write_text(lines + "b\n")
        found = read(tokenizer, {"source": str(tmp_path / "p.txt"), "max_bad_rows": 1, **settings})
        assert (texts(tokenizer, found), found.bad) == (["b"], 1)


def test_answers(tokenizer):
    assert answer_ids(tokenizer, ["b", "a"]) == [tokenizer("b")["input_ids"][0], tokenizer("a")["input_ids"][0]]
    with pytest.raises(UsageError) as caught:
        answer_ids(tokenizer, ["a", "no"])
    assert caught.value.found == "'no', which is 'n', 'o'"


GOOD = {"positive": "a.txt", "negative": ["b.txt", "c.jsonl"], "layers": "8-12"}
BAD = {
    "nothing": ({}, "give either `vectors`, a file, or `positive`"),
    "both": ({"vectors": "v.safetensors", **GOOD}, "give either `vectors`"),
    "a key of the other way": ({"vectors": "v.safetensors", "layers": 3}, "layers is for vectors computed"),
    "no negative": ({"positive": "a.txt", "layers": 3}, "the plain mean cancels"),
    "no layers": ({"positive": "a.txt", "negative": "b.txt"}, 'site = "residual" needs `layers`'),
    "answers of the mean": ({**GOOD, "answers": ["a", "b"]}, "answers is for weighting"),
    "heads of a layer": ({**GOOD, "heads": 3}, 'heads is for site = "head"'),
    "layers twice": ({**GOOD, "site": "head", "heads": [[1, 2]]}, "remove `layers`"),
    "choose by nothing": (
        {"positive": "a", "weighting": "entropy", "site": "head", "heads": 3}, "give both"),
    "prompts and source": ({**GOOD, "positive": {"source": "a.txt", "prompts": ["x"]}}, "either `source` or `prompts`"),
    "neither": ({**GOOD, "positive": {}}, "either `source` or `prompts`"),
    "a key of training": ({**GOOD, "negative": {"source": "b.txt", "pack": True}}, "pack is for training data"),
    "a bad range": ({**GOOD, "layers": "8:12"}, "layers"),
    "negative layer": ({**GOOD, "layers": [-1]}, "layers"),
    "one answer": ({**GOOD, "weighting": "entropy", "answers": ["a"]}, "answers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters(case):
    values, words = BAD[case]
    with pytest.raises(ValidationError, match=words):
        SteerParams.model_validate_json(json.dumps(values), strict=True)


def test_good_parameters():
    given = SteerParams.model_validate_json(json.dumps(GOOD), strict=True)
    assert given.negative.sources == ("b.txt", "c.jsonl")
    inline = {"positive": {"prompts": ["x"]}, "weighting": "entropy", "site": "head", "heads": "heads.json"}
    given = SteerParams.model_validate_json(json.dumps(inline), strict=True)
    assert given.heads == Path("heads.json")
    assert given.positive.prompts == ("x",)


def test_messages_name_the_place_in_the_recipe(workplace):
    step = {"use": "steer", "positive": "a.txt", "negative": "b.txt"}
    Path("recipe.toml").write_text(recipe_text("base", step, path="out"))
    ran = regraft("check", "recipe.toml")
    assert ran.code == 2
    assert 'recipe.toml:3:3: steps[0]: site = "residual" needs `layers`' in ran.err
    Path("recipe.toml").write_text(recipe_text("base", {**step, "layers": "3.4"}, path="out"))
    ran = regraft("check", "recipe.toml")
    place, _, message = ran.err.partition("steps[0].layers: ")
    assert place.endswith("recipe.toml:7:1: ")
    expected = 'expected an integer of at least 0, an array of at least 1 integers or a range such as "8-12" or "8-"'
    assert message == f'{expected}, found "3.4"\n'


def test_by_a_recipe(workplace):
    """Plan, apply, lock file; paths start at the recipe's folder; the report steers another base the same way."""
    Path("sets").mkdir()
    Path("sets", "glad.txt").write_text("I love it\nhow good\n")
    Path("sets", "sad.txt").write_text("I hate it\nhow bad!\n")
    step = {"use": "steer", "positive": "glad.txt", "negative": "sad.txt", "layers": "0-", "strength": 4.0}
    Path("sets", "recipe.toml").write_text(recipe_text("../base", step, path="out"))
    planned = regraft("plan", "sets/recipe.toml")
    assert planned.code == 0, planned.err
    assert "2 vectors at residual, computed from prompts when the step runs" in planned.out
    assert "switch mlp_bias" in planned.out
    ran = regraft("apply", "sets/recipe.toml", "--verify", "load")
    assert ran.code == 0, ran.err
    lock = json.loads(Path("out", "regraft.lock.json").read_text())
    (facts,) = lock["steps"]
    assert facts["metrics"]["positive"]["files"].keys() == {"glad.txt"}
    assert facts["metrics"]["vectors"] == 2
    assert str(workplace) not in json.dumps(lock)
    report = Path("out", "regraft", "steer", "vectors.safetensors")
    again = {"use": "steer", "vectors": str(report), "strength": 4.0}
    Path("again.toml").write_text(recipe_text("base", again, path="out2"))
    ran = regraft("apply", "again.toml")
    assert ran.code == 0, ran.err
    for shard in sorted(Path("out").glob("*.safetensors")):
        assert shard.read_bytes() == Path("out2", shard.name).read_bytes()


def test_a_plan_imports_no_torch(tiny_folder):
    program = """
        import json, sys
        from regraft.core.sources.open import open_checkpoint
        from regraft.plugins.steer import Steer
        step, checkpoint = Steer(), open_checkpoint(sys.argv[1])
        params = step.Params.model_validate_json(sys.argv[2])
        step.check(checkpoint, params)
        step.plan(checkpoint, params)
        print(sorted({"torch", "transformers", "matplotlib"} & set(sys.modules)))
    """
    params = {"positive": {"prompts": ["a"]}, "negative": {"prompts": ["b"]}, "layers": 0}
    assert run_python(program, tiny_folder(), json.dumps(params)) == "[]\n"
