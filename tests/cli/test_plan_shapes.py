"""`regraft plan --shape --world-size`: what each process needs, from a config alone, against formulas."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from regraft.cli.console import human_bytes
from regraft.cli.main import app
from regraft.cli.plan import human_seconds
from tests.families import FAMILIES, save_tiny
from tests.running import ABF, done, regraft, write_recipe

SHAPES = Path(__file__).parents[1] / "shapes"
NUMBERS = {"llama-2-7b": 6_738_415_616, "llama-3-70b": 70_553_706_496, "llama-3.1-405b": 405_853_388_800}
"""Of parameters, as their publishers count them."""
GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "scale-out.md"


def config(name):
    return json.loads((SHAPES / f"{name}.json").read_text())


def planned(recipe, name, world, *options):
    return done("plan", recipe, "--shape", SHAPES / f"{name}.json", "--world-size", world, "--json", *options).json


@pytest.fixture
def recipes(tmp_path):
    """Two recipes on a base that does not exist: every tensor cast, and all weights trained on sequences of 2048."""
    (tmp_path / "text.txt").write_text("text")
    data = tmp_path / "train.toml"
    data.write_text(
        '[base]\nmodel = "nobody/nothing"\n[[steps]]\nuse = "fine-tune"\nbatch_size = 64\nmicro_batch = 1\n'
        'data = { source = "text.txt", max_tokens = 2048 }\n'
    )
    return {"cast": write_recipe(tmp_path / "cast.toml", "nobody/nothing", dtype="float32"), "train": data}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("world", [1, 8])
def test_a_training_by_the_formula(recipes, name, world):
    """Whole fp32 weights and one more of the largest; gradients and two moments shared out; activations."""
    numbers, shape = NUMBERS[name], config(name)
    largest = max(shape["vocab_size"], shape["intermediate_size"]) * shape["hidden_size"]
    activations = 34 * shape["hidden_size"] * shape["num_hidden_layers"] * 2048 * 2
    found = planned(recipes["train"], name, world)["per_process"]
    expected = 4 * (numbers + largest) + 12 * numbers // world + activations
    assert found["step_memory_bytes"] == {"fine-tune": expected}
    assert found["memory_bytes"] == expected + found["writing_memory_bytes"]


@pytest.mark.parametrize("name", NUMBERS)
def test_writing_is_shared_out_by_bytes(recipes, name):
    plans = {world: planned(recipes["cast"], name, world, "--rate", 0.5) for world in (1, 8)}
    alone, shared = (plans[world]["per_process"] for world in (1, 8))
    whole = sum(plans[8]["weight_files"].values()) - plans[8]["weight_files"]["model.safetensors.index.json"]
    assert 4 * NUMBERS[name] < whole < 4 * NUMBERS[name] + (1 << 20)
    assert alone["written_bytes"] == [whole]
    assert sum(shared["written_bytes"]) == whole
    assert max(shared["written_bytes"]) < whole / 8 + 5e9, "no more than a file above the mean"
    assert shared["writing_seconds"] == pytest.approx(max(shared["written_bytes"]) / 0.5e9, abs=1e-3)
    assert shared["memory_bytes"] < 1 << 29, "whatever the size of the model"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shape_is_the_checkpoint_without_its_values(family, tiny_folder, tmp_path):
    folder = tiny_folder(family)
    recipe = write_recipe(tmp_path / "cast.toml", folder, dtype="bfloat16", shard_size="30KB")
    real, shaped = (done("plan", recipe, "--json", *options).json for options in ((), ("--shape", folder)))
    sizes = [sum(size for name, size in plan["weight_files"].items() if "index" not in name) for plan in (real, shaped)]
    assert {kind: sorted(names) for kind, names in shaped["changes"].items()} == {
        kind: sorted(names) for kind, names in real["changes"].items()
    }
    assert abs(sizes[0] - sizes[1]) < 2000, "headers alone may differ, by the order of the tensors"


def test_what_is_copied_and_what_is_linked(tmp_path):
    base = save_tiny("llama", tmp_path / "base", shards="60KB")
    recipe = write_recipe(tmp_path / "abf.toml", base, ABF)
    shape = done("plan", recipe, "--shape", base, "--json").json
    assert set(map(len, (shape["changes"]["rewritten"], shape["changes"]["added"]))) == {0}
    linked = done("plan", recipe, "--world-size", 3, "--link", "--json").json["per_process"]
    assert linked["written_bytes"] == [0, 0, 0]
    alone = done("plan", recipe, "--world-size", 1, "--json").json
    assert alone["per_process"]["memory_bytes"] == alone["memory_bytes"] < linked["memory_bytes"], (
        "torch is not imported"
    )


def test_the_plan_for_people(recipes):
    out = done("plan", recipes["train"], "--shape", SHAPES / "llama-2-7b.json", "--world-size", 8).out
    assert "each of 8 processes: at most 56.3 GB of memory\n  fine-tune: 55.8 GB\n  writing: " in out
    assert "  writes at most 4.99 GB, about 5.0 s at 1 GB a second;\n" in out
    assert out.endswith("what steps read, compute and train comes on top\n")


def rows(recipes):
    """The table of the guide."""
    for name in NUMBERS:
        for world in (1, 8, 64):
            cast, train = (planned(recipes[each], name, world, "--threads", 4) for each in ("cast", "train"))
            write, steps = cast["per_process"], train["per_process"]["memory_bytes"]
            figures = [write["memory_bytes"], max(write["written_bytes"])]
            seconds = human_seconds(write["writing_seconds"])
            cells = [*map(human_bytes, figures), seconds, *map(human_bytes, (steps, train["disk_bytes"]))]
            yield f"| {name} | {world} | {' | '.join(cells)} |"


def test_the_table_of_the_guide_is_what_the_command_says(recipes):
    table = [line for line in GUIDE.read_text().splitlines() if line.startswith("| llama")]
    assert table == list(rows(recipes))


def blocks(language):
    """Code blocks of the guide in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def options_of(words):
    return {word.partition("=")[0] for word in words if word.startswith("-")}


def check_torchrun(words):
    """The words of a call of torchrun that starts regraft: every option is one of theirs."""
    from torch.distributed.run import get_args_parser

    split = words.index("-m")
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert options_of(words[1:split]) <= known
    assert words[split + 1 : split + 3] == ["regraft", "apply"]
    _, command, *rest = words[split + 1 :]
    context = typer.main.get_command(app)
    parameters = context.get_command(None, command).params
    assert options_of(rest) <= {option for parameter in parameters for option in parameter.opts}


def test_the_slurm_script(tmp_path):
    (script,) = blocks("bash")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    lines = script.replace("\\\n", " ").splitlines()
    (call,) = [shlex.split(line) for line in lines if line.startswith("srun ")]
    check_torchrun(call[1:])
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert all(re.fullmatch(r"--[a-z-]+(=[\w:.]+)?", each) for each in asked)
    assert "--ntasks-per-node=1" in asked, "torchrun starts the processes of a machine"


def test_the_kubernetes_objects():
    service, job = yaml.safe_load_all(*blocks("yaml"))
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = [*container["command"], *container["args"]]
    check_torchrun(words)
    assert f"--nnodes={job['spec']['completions']}" in words
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert f"--master-addr={name}-0.{pod['subdomain']}" in words
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in words


@pytest.mark.parametrize(("text", "code", "message"), [
    (None, 3, "there is no such config"),
    ("{}", 3, "config.json: model_type: is missing"),
    ('{"model_type": "llama", "hidden_size": "wide"}', 3, "hidden_size"),
    ('{"model_type": "llama", "dtype": "int3"}', 3, "unknown dtype"),
    ('{"model_type": "llama", "quantization_config": {}}', 1, "how quantised weights are stored"),
])  # fmt: skip
def test_a_config_that_is_none(recipes, tmp_path, text, code, message):
    file = tmp_path / "config.json"
    if text is not None:
        file.write_text(text)
    ran = regraft("plan", recipes["cast"], "--shape", file)
    assert ran.code == code, ran.err
    assert message in ran.err


def test_neither_torch_nor_transformers_is_imported(recipes):
    program = (
        "import sys; from regraft.cli.main import run\n"
        "try: run(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    options = ["plan", recipes["train"], "--shape", SHAPES / "llama-3.1-405b.json", "--world-size", "64"]
    subprocess.run([sys.executable, "-c", program, *map(str, options)], check=True, capture_output=True)
