"""What paths in recipes are relative to."""

import os
from pathlib import Path

import pytest

MERGE = '[[steps]]\nuse = "lora-merge"\nadapter = "{adapter}"\n'
LOFIT = '[[steps]]\nuse = "lofit"\n'


def recipe(model="demo:tiny", adapter="demo:x"):
    return f'base.model = "{model}"\n' + MERGE.format(adapter=adapter)


@pytest.mark.parametrize(
    ("written", "usable"),
    [
        ("demo:tiny", "demo:tiny"),
        ("s3://bucket/x", "s3://bucket/x"),
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("here", "./sub/here"),
        ("here/inner", "./sub/here/inner"),
        ("./missing", "./sub/missing"),
        ("../up", "./sub/../up"),
        ("..", "./sub/.."),
        ("org/model.gguf", "./sub/org/model.gguf"),
        ("x.safetensors", "./sub/x.safetensors"),
        ("/abs/model", "/abs/model"),
    ],
)
def test_a_model_beside_the_recipe(load, written, usable):
    Path("sub/here/inner").mkdir(parents=True)
    result = load(recipe(written, written), file="sub/r.toml")
    assert result.base.model == result.steps[0].params.adapter == usable
    assert result.resolved()["base"]["model"] == result.resolved()["steps"][0]["adapter"] == written


@pytest.mark.parametrize("written", ["org/model", "here", "./missing", "../up", "x.gguf"])
def test_beside_the_current_folder_nothing_changes(load, written):
    Path("here").mkdir()
    result = load(recipe(written, written))
    assert result.base.model == result.steps[0].params.adapter == written
    assert result.resolved()["base"]["model"] == written


def test_a_model_beside_the_user_but_not_beside_the_recipe(problems):
    Path("models/llama").mkdir(parents=True)
    remedy = 'paths start at the folder of the recipe: write "../models/llama"'
    found = 'there is no "models/llama" beside the recipe, but there is one in the current folder'
    assert problems(recipe("models/llama"), file="sub/r.toml") == [f"sub/r.toml:1:6: base.model: {found} ({remedy})"]


def test_home(load, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    result = load(recipe("~/m") + LOFIT + 'data = "~/d"\n[output]\npath = "~/out"\n')
    assert result.base.model == "/home/me/m"
    assert result.steps[1].params.data == Path("/home/me/d")
    assert result.output.path == Path("/home/me/out")
    resolved = result.resolved()
    assert resolved["base"]["model"] == "~/m"
    assert resolved["steps"][1]["data"] == "~/d"
    assert resolved["output"]["path"] == "~/out"


def test_parameters_of_type_path(load):
    text = LOFIT + 'data = "qa.jsonl"\ncorpus = "demo"\nlabel = "text"\nplace = "here"\nextra = ["a", "/b", "../c"]\n'
    params = load('base.model = "demo:tiny"\n' + text, file="sub/r.toml").steps[0].params
    assert params.data == Path("sub/qa.jsonl")
    assert params.corpus == "demo"
    assert (params.label, params.place) == ("text", Path("sub/here"))
    assert params.extra == [Path("sub/a"), Path("/b"), Path("sub/../c")]


def test_models_in_unions_and_arrays(load):
    text = recipe() + LOFIT + 'data = "d"\nmodels = ["./a", "org/b", { model = "c.gguf" }]\nteacher = "./t"\n'
    params = load(text, file="sub/r.toml").steps[1].params
    assert params.models[:2] == ["./sub/a", "org/b"]
    assert params.models[2].model == "./sub/c.gguf"
    assert params.teacher == "./sub/t"


def test_an_alternative_to_a_choice_is_a_path(load):
    text = 'base.model = "demo:tiny"\n' + LOFIT + 'data = "x"\ncorpus = "mine.txt"\n'
    assert load(text, file="sub/r.toml").steps[0].params.corpus == Path("sub/mine.txt")


def test_files_are_looked_for_beside_the_recipe(load):
    Path("sub").mkdir()
    Path("sub/table.csv").write_text("x")
    result = load(recipe() + 'table = "table.csv"\nfolder = "."\n', file="sub/r.toml")
    assert result.steps[0].params.table == Path("sub/table.csv")
    assert result.steps[0].params.folder == Path("sub")


def test_the_output_goes_where_the_user_stands(load):
    result = load(recipe() + '[output]\npath = "out/x"\n', file="sub/r.toml")
    assert result.output.path == Path("out/x")
    assert result.resolved()["output"]["path"] == "out/x"
    assert result.resolved(Path("elsewhere"))["output"]["path"] == "out/x"


def test_every_file_of_a_chain_has_paths_of_its_own(load):
    Path("parent").mkdir()
    Path("parent/base").mkdir()
    Path("parent/p.toml").write_text(
        'base.model = "base"\n' + MERGE.format(adapter="./a") + LOFIT + 'data = "d"\nextra = ["e"]\n'
    )
    result = load('extends = "../parent/p.toml"\nseed = 1\n', file="child/r.toml")
    assert result.base.model == "./child/../parent/base"
    assert Path(result.base.model).is_dir()
    assert result.steps[0].params.adapter == "./child/../parent/a"
    assert result.steps[1].params.data == Path("child/../parent/d")
    resolved = result.resolved()
    assert resolved["base"]["model"] == "../parent/base"
    assert resolved["steps"][0]["adapter"] == "../parent/a"
    assert resolved["steps"][1]["data"] == "../parent/d"
    assert resolved["steps"][1]["extra"] == ["../parent/e"]
    below = result.resolved(Path("parent"))
    assert below["base"]["model"] == "./base"
    assert below["steps"][0]["adapter"] == "./a"


def test_options_are_relative_to_the_current_folder(load):
    Path("sub").mkdir()
    Path("mine").mkdir()
    text = recipe() + LOFIT + 'data = "d"\n'
    result = load(text, "base.model=mine", "lora-merge.adapter=./a", "lofit.data=here/d", file="sub/r.toml")
    assert (result.base.model, result.steps[0].params.adapter) == ("mine", "./a")
    assert result.steps[1].params.data == Path("here/d")
    resolved = result.resolved()
    assert (resolved["base"]["model"], resolved["steps"][0]["adapter"]) == ("../mine", "../a")
    assert resolved["steps"][1]["data"] == "../here/d"


def test_no_absolute_path_where_a_relative_one_was_written(load, inside):
    text = recipe("./m", "./a") + LOFIT + 'data = "../d"\nextra = ["e"]\n'
    result = load(text, file=str(inside / "sub/r.toml"))
    assert result.base.model == f"{inside}/sub/m"
    assert result.steps[1].params.data == inside / "sub/../d"
    assert os.fspath(inside) not in str(result.resolved())
    assert result.resolved()["steps"][1]["data"] == "../d"
    assert result.resolved(inside)["steps"][1]["extra"] == ["sub/e"]


def test_a_path_that_was_replaced_after_reading_is_written_as_it_is(load):
    result = load(recipe() + '[output]\npath = "out/x"\n')
    output = result.output.model_copy(update={"path": Path("other")})
    assert result.model_copy(update={"output": output}).resolved()["output"]["path"] == "other"


def test_characters_that_no_path_has(problems):
    text = recipe("a\\u0000b") + LOFIT + 'data = "\\u0000"\n'
    assert problems(text) == [
        "r.toml:1:6: base.model: a path cannot hold the character U+0000",
        "r.toml:7:1: steps[1].data: a path cannot hold the character U+0000",
    ]
