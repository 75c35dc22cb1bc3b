"""A new plugin package: what is written, what is refused, and that it installs and passes its tests."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from regraft.core.errors import ResourceError, UsageError
from regraft.core.hookspecs import API_VERSION
from regraft.core.host import host
from regraft.core.plugin_kit.new import names_of as names
from regraft.core.plugin_kit.new import new_plugin, package_files
from regraft.core.provenance import package_version
from tests.helpers import raising
from tests.plugin_host import host_with
from tests.running import tree


def test_every_file_says_the_name_where_it_stands(tmp_path):
    folder, files = new_plugin("thin-layers", tmp_path / "here", host())
    assert folder == tmp_path / "here"
    assert files == sorted(name for name, digest in tree(folder).items() if digest != "folder")
    assert files == sorted(
        [
            ".github/workflows/tests.yml",
            ".gitignore",
            "README.md",
            "pyproject.toml",
            "src/regraft_thin_layers/__init__.py",
            "tests/test_thin_layers.py",
        ]
    )
    texts = {name: (folder / name).read_text() for name in files}
    declared = tomllib.loads(texts["pyproject.toml"])
    assert declared["project"]["name"] == "regraft-thin-layers"
    assert declared["project"]["entry-points"]["regraft"] == {"thin-layers": "regraft_thin_layers"}
    assert declared["project"]["dependencies"] == [f"regraft>={package_version('regraft')},<0.2"]
    module = texts["src/regraft_thin_layers/__init__.py"]
    assert f'regraft_api = ">={API_VERSION},<2"' in module
    assert "class ThinLayers(WeightSpace[ThinLayersParams])" in module
    assert "${{ matrix.python }}" in texts[".github/workflows/tests.yml"]
    assert "Licence" in texts["README.md"]
    assert not any(re.search(r"\$[a-z{](?!\{)", text.replace("${{", "")) for text in texts.values())


def test_no_name_makes_a_class_that_hides_what_the_package_uses():
    """Nor one that Python does not take: `regraft plugins new none` is a package that can be imported."""
    files = package_files(names("thin-layers"))
    sources = [files["src/regraft_thin_layers/__init__.py"], files["tests/test_thin_layers.py"]]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.name for node in nodes if isinstance(node, ast.alias | ast.ClassDef)}
    used -= {"ThinLayers", "ThinLayersParams"}
    assert {"Scale", "Params", "Conformance"} <= used
    for word in [*used, "None", "True", "False"]:
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", word).lower()
        if word[0].isupper():
            made = names(name).class_name
            assert not {made, f"{made}Params"} & used, name
            ast.parse(package_files(names(name))[f"src/{names(name).module}/__init__.py"])


def test_the_transformation_is_short_and_imports_only_the_public_api():
    files = package_files(names("thin-layers"))
    module = files["src/regraft_thin_layers/__init__.py"]
    assert len(module.splitlines()) <= 60
    for text in (module, files["tests/test_thin_layers.py"]):
        assert max(map(len, text.splitlines())) <= 120
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        ours = [node.module for node in nodes if (node.module or "").partition(".")[0] == "regraft"]
        assert set(ours) <= {"regraft", "regraft.testing"}


@pytest.mark.parametrize(
    "name",
    [
        *("", "Scale", "scale_layers", "-scale", "scale-", "2fold", "a--b", "../x", "regraft", "testing", "x" * 41),
        *("schema", "name", "seed", "extends", "base", "steps", "output", "regraft-output"),
    ],
)
def test_a_bad_name_is_refused_and_nothing_is_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="cannot be the name of a plugin") as caught:
        new_plugin(name, None, host())
    assert "scale-layers" in caught.value.remedy
    assert tree(tmp_path) == {}


def test_the_prefix_may_be_given():
    assert names("regraft-thin-layers") == names("thin-layers")


def test_a_name_that_is_taken_is_refused(tmp_path):
    with pytest.raises(UsageError, match="there is a transformation of this name") as caught:
        new_plugin("lora-merge", tmp_path / "x", host())
    assert caught.value.found == "brought by lora-merge"

    def broken():
        raise ImportError("no flash_attn")

    with pytest.raises(UsageError, match="there is a transformation of this name") as caught:
        new_plugin("toy", tmp_path / "x", host_with(regraft_transformations=broken))
    assert "broken" in caught.value.found


def test_a_package_that_is_installed_is_not_shadowed(tmp_path, monkeypatch):
    monkeypatch.setattr("regraft.core.plugin_kit.new.package_version", lambda name: "1.2")
    with pytest.raises(UsageError, match="there is a package of this name"):
        new_plugin("thin-layers", tmp_path / "x", host())


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="the folder holds something already"):
        new_plugin("thin-layers", tmp_path, host())
    with pytest.raises(UsageError, match="is a file"):
        new_plugin("thin-layers", tmp_path / "file", host())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, exists):
    target = tmp_path / "x"
    if exists:
        target.mkdir()
    write = Path.write_text

    def full(path, *arguments, **options):
        return (raising(28) if path.name.startswith("test_") else write)(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResourceError, match="cannot be written: No space left"):
        new_plugin("thin-layers", target, host())
    assert tree(tmp_path) == ({"x": "folder"} if exists else {})


@pytest.mark.slow
def test_a_new_package_installs_is_listed_and_passes_its_tests(tmp_path):
    source, _ = new_plugin("thin-layers", tmp_path / "source", host())
    site = tmp_path / "site"
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", site]
    subprocess.run([sys.executable, *install, source], check=True, timeout=120)
    variables = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    listed = _python(source, variables, "-m", "regraft", "plugins", "--json")
    (info,) = [info for info in json.loads(listed)["plugins"] if info["name"] == "thin-layers"]
    assert info["status"] == "loaded"
    assert info["transformations"] == ["thin-layers"]
    ran = _python(source, variables, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert re.search(r"^\d\d passed(, 1 warning)? in", ran, re.MULTILINE), ran


def _python(folder, variables, *arguments):
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    return ran.stdout
