"""Every hook by way of a stranger's package, called in this process and installed into an environment of its own."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from regraft.core import hookspecs
from regraft.core.architectures import Family, architecture_of
from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import PluginError, Unsupported
from regraft.core.evaluate.metric import Measuring
from regraft.core.evaluate.tasks import read_tasks
from regraft.core.host import DISABLE, GROUP, Host
from regraft.core.loaded import Loaded
from regraft.core.patch import Patch, overlay
from regraft.core.sources import open_checkpoint
from regraft.core.transformation import Run
from tests.checkpoints import same_bits, write_checkpoint
from tests.third_party import regraft_example_plugin as example

HOOKS = [name for name in vars(hookspecs) if name.startswith("regraft_")]
THIRD_PARTY = Path(__file__).parents[1] / "third_party"


def example_host(**environment):
    entry = EntryPoint("example", example.__name__, GROUP)
    return Host([entry], environment)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_and_has_a_test_of_its_own(name):
    documentation = " ".join(inspect.getdoc(getattr(hookspecs, name)).split())
    assert len(documentation) > 80
    assert "Since API" in documentation
    assert f"test_hook_{name.removeprefix('regraft_')}" in globals()
    assert hasattr(example, name)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_stands_in_the_reference_with_its_signature(name):
    page = (THIRD_PARTY.parents[1] / "docs" / "reference" / "hooks.md").read_text()
    (section,) = [part for part in page.split("\n## ") if part.startswith(f"{name}\n")]
    function = getattr(hookspecs, name)
    assert f"def {name}{inspect.signature(function)}: ...".replace("'", "") in section
    assert inspect.getdoc(function) in section


def test_the_reference_has_no_other_hook():
    page = (THIRD_PARTY.parents[1] / "docs" / "reference" / "hooks.md").read_text()
    assert [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")] == HOOKS


def tensors():
    return {"a.weight": torch.randn(4, 3).bfloat16(), "b.bias": torch.randn(4)}


def test_hook_transformations(tmp_path):
    found = example_host()
    kind = found.transformations()["example-scale"]
    assert found.owners == {"example-scale": "example"}
    base = open_checkpoint(write_checkpoint(tmp_path / "m", tensors()))
    step, params = kind(), kind.Params(factor=3.0)
    step.check(base, params)
    patch = step.apply(base, params, Run("s"))
    assert step.plan(base, params).deviations(patch) == []
    above = overlay(base, patch, by="s")
    expected = {name: base.load(name) for name in base.tensors}
    expected["a.weight"] = (expected["a.weight"].float() * 3).bfloat16()
    assert same_bits({name: above.load(name) for name in above.tensors}, expected)
    assert above.config["example_factor"] == 3.0
    with pytest.raises(Unsupported, match="no tensor has this ending"):
        step.check(base, kind.Params(factor=1.0, ending=".nothing"))


def test_hook_sources(tmp_path):
    write_checkpoint(tmp_path / "m", tensors())
    opened = open_checkpoint("example:m", folder=tmp_path, extra=example_host().sources())
    assert opened.label == "example:m"
    assert opened.origin == {"source": "example"}
    assert set(opened.specs) == set(tensors())


def test_hook_metrics(tmp_path):
    (task,) = read_tasks(["example-letters:ab"], example_host().metrics())
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "m", tensors()))
    subject = Loaded(replace(checkpoint, label="a"), None, None, "cpu", "float32")
    measured = task.metric.measure(subject, task.params, Measuring())
    assert measured.samples["share"].value == 0.5


def test_hook_architectures():
    config = {
        "model_type": "example_model",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 5,
    }
    with pytest.raises(Unsupported):
        architecture_of(config, derive=False)
    families = example_host().architectures()
    assert all(isinstance(family, Family) for family in families)
    found = architecture_of(config, families=families, derive=False)
    assert found.slot("q_proj", 1).tensor == "model.blocks.1.query.weight"


def test_hook_commands(tmp_path):
    app = typer.Typer()
    app.command("other")(lambda: None)
    example_host().add_commands(app)
    write_checkpoint(tmp_path, tensors())
    result = CliRunner().invoke(app, ["example-count", str(tmp_path)])
    assert result.output == "2\n"


def checkpoint(**config):
    return Checkpoint("m", {}, {"config.json": FileRef(data=json.dumps(config).encode())})


def test_hook_before_step():
    found = example_host()
    found.before_step("s", checkpoint())
    with pytest.raises(PluginError, match="regraft_before_step raised ValueError: m is frozen, and s would") as caught:
        found.before_step("s", checkpoint(example_frozen=True))
    assert caught.value.where == "example"
    assert f"{DISABLE}=example" in caught.value.remedy
    assert isinstance(caught.value.__cause__, ValueError)
    example_host(**{DISABLE: "example"}).before_step("s", checkpoint(example_frozen=True))


def test_hook_after_step():
    found = example_host()
    found.after_step("s", checkpoint(), Patch(removals=frozenset({"free.x"})))
    with pytest.raises(PluginError, match=r"s takes frozen\.x out of m"):
        found.after_step("s", checkpoint(), Patch(removals=frozenset({"frozen.x", "free.x"})))


@pytest.mark.slow
def test_a_package_is_found_once_it_is_installed(tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=120)
    python = environment / "bin" / "python"
    packages = next((environment / "lib").glob("python*/site-packages"))
    here = [path for path in sys.path if path.endswith("-packages")]
    (packages / "here.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in here))
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "regraft_example_plugin.py"):
        (source / name).write_bytes((THIRD_PARTY / name).read_bytes())
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", source]
    subprocess.run([python, *install], check=True, timeout=300)
    result = subprocess.run(
        [python, "-m", "regraft", "plugins", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=tmp_path,
    )
    listed = {info["name"]: info for info in json.loads(result.stdout)["plugins"]}
    assert listed["example"] == {
        "name": "example",
        "module": "regraft_example_plugin",
        "distribution": "regraft-example-plugin",
        "version": "0.3.0",
        "status": "loaded",
        "reason": "",
        "transformations": ["example-scale"],
    }
    assert listed["patch"]["status"] == "loaded"
    write_checkpoint(tmp_path / "m", tensors())
    counted = subprocess.run(
        [python, "-m", "regraft", "example-count", tmp_path / "m"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert counted.stdout == "2\n"
