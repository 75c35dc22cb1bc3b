"""`regraft plugins`, `plugins new` and `plugins check`."""

import sys
from pathlib import Path

import pytest

from tests.plugin_host import host_with
from tests.running import done, regraft


def test_our_own():
    lines = done("plugins").out.splitlines()
    assert lines[0].split() == ["plugin", "package", "status", "transformations"]
    assert any(line.split()[0] == "lora-merge" and "loaded" in line for line in lines)
    result = done("plugins", "--json").json
    assert result["schema"] == 1
    names = {item["name"] for item in result["transformations"]}
    assert {"context-extension", "lora-merge", "patch"} <= names
    for item in result["transformations"]:
        assert item["summary"]
        assert item["loads_with"]
    assert all(plugin["status"] == "loaded" for plugin in result["plugins"])


def test_a_broken_one_is_listed_with_its_reason(monkeypatch):
    def broken():
        raise ImportError("no module named flash_attn")

    monkeypatch.setattr("regraft.core.host.host", lambda: host_with(regraft_transformations=broken))
    out = done("plugins").out
    assert "broken: regraft_transformations raised ImportError: no module named flash_attn" in out
    plugin = next(item for item in done("plugins", "--json").json["plugins"] if item["name"] == "toy")
    assert plugin["status"] == "broken"
    assert plugin["transformations"] == []
    monkeypatch.setattr("regraft.core.host.host", lambda: host_with(regraft_sources=broken))
    assert "broken: regraft_sources raised ImportError" in done("plugins").out


# New and checked ones

MODULE = '''"""A plugin of a test."""

{top}from pydantic import Field
from regraft import Params, Patch, WeightSpace, hookimpl

regraft_api = "{api}"


class ToyParams(Params):
    """Nothing but a number."""

    number: int = Field(1, description="A number.")


class Toy(WeightSpace[ToyParams]):
    """Writes a number into the config."""

    name, summary = "toy-number", "{summary}"
    Params = ToyParams

    def patch(self, checkpoint, params):
        """One key."""
        return Patch(json={{"config.json": {{"toy_number": params.number}}}})


@hookimpl
def regraft_transformations():
    """Ours."""
    return [Toy]
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Called with what differs, the folder of a package with one transformation; its modules are forgotten again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    modules = []

    def write(name="toy_of_a_test", *, summary="Write a number.", api=">=1,<2", top=""):
        (tmp_path / "pyproject.toml").write_text(f'[project.entry-points.regraft]\ntoy = "{name}"\n')
        (tmp_path / f"{name}.py").write_text(MODULE.format(summary=summary, api=api, top=top))
        modules.append(name)
        return tmp_path

    yield write
    for name in modules:
        sys.modules.pop(name, None)


def test_new_writes_a_package_and_says_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = done("plugins", "new", "thin-layers").out.splitlines()
    assert lines[-1].startswith("wrote regraft-thin-layers; next: cd regraft-thin-layers")
    assert all(Path(line).is_file() for line in lines[:-1])
    again = regraft("plugins", "new", "thin-layers")
    assert (again.code, "holds something already" in again.err) == (2, True)
    written = done("plugins", "new", "thin-layers", "--path", "elsewhere", "--json").json
    assert written["path"] == "elsewhere"
    assert "pyproject.toml" in written["files"]
    assert "next: cd 'two words' && pip" in done("plugins", "new", "wide-layers", "--path", "two words").out
    assert regraft("plugins", "new", "steer").code == 2


def test_check_runs_the_named_checks_of_a_folder(package):
    folder = package()
    names = ("describes_itself", "metrics_are_plain", "refuses_missing_tensors")
    only = [word for name in names for word in ("--only", name)]
    ran = done("plugins", "check", folder, *only, "--family", "llama")
    assert [line.split() for line in ran.out.splitlines() if line.startswith("toy-number")] == [
        ["toy-number", "passed", "has_an_example"],
        ["toy-number", "passed", "describes_itself"],
        ["toy-number", "passed", "metrics_are_plain"],
        ["toy-number", "not", "applicable", "refuses_missing_tensors"],
    ]
    assert ran.out.splitlines()[-1].endswith("1 transformation, 3 checks passed, 0 failed, 1 not applicable")


def test_check_says_what_does_not_hold_and_fails(package):
    folder = package("toy_that_mumbles", summary="no sentence")
    ran = regraft("plugins", "check", folder, "--only", "describes_itself", "--family", "llama")
    assert ran.code == 1
    assert "remedy: say in one sentence what it does" in ran.out
    ran = regraft("plugins", "check", folder, "--only", "describes_itself", "--family", "llama", "--json")
    assert ran.code == 1
    assert ran.json["failed"] == 1
    (_, outcome) = ran.json["transformations"]["toy-number"]
    assert (outcome["check"], outcome["status"]) == ("describes_itself", "failed")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"api": ">=7"}, "asks for plugin API >=7"), ({"top": "import nowhere_to_be_found\n"}, "ModuleNotFoundError")],
)
def test_check_of_a_broken_plugin_is_a_plugin_fault(package, settings, reason):
    ran = regraft("plugins", "check", package("toy_that_is_broken", **settings))
    assert ran.code == 5
    assert reason in ran.err


@pytest.mark.parametrize(
    ("name", "right", "wrong", "reason"),
    [
        ("toy_unmarked", "@hookimpl\n", "", "regraft_transformations is not marked with @hookimpl"),
        ("toy_returning", "return [Toy]", "[Toy]", "regraft_transformations returned None, not a sequence"),
        ("toy_sources", "regraft_transformations():", "regraft_sources():", "which is no source"),
    ],
)
def test_check_tells_a_forgotten_mark_and_a_forgotten_return(package, name, right, wrong, reason):
    file = package(name) / f"{name}.py"
    file.write_text(file.read_text().replace(right, wrong))
    ran = regraft("plugins", "check", file.parent)
    assert (ran.code, reason in ran.err) == (5, True)


def test_check_of_what_is_no_plugin(package, tmp_path):
    ran = regraft("plugins", "check", "regraft-lora")
    assert (ran.code, "no such plugin is installed" in ran.err) == (2, True)
    ran = regraft("plugins", "check", "no/such/folder")
    assert (ran.code, "is no folder of a package" in ran.err) == (2, True)
    for text in (
        "[project]\n",
        "project = 1\n",
        "[project]\nentry-points = 1\n",
        "project.entry-points.regraft = []\n",
    ):
        (tmp_path / "pyproject.toml").write_text(text)
        ran = regraft("plugins", "check", tmp_path)
        assert (ran.code, "declares no plugin" in ran.err) == (3, True)
    (tmp_path / "pyproject.toml").write_text("[project\n")
    assert regraft("plugins", "check", tmp_path).code == 3
    package()
    ran = regraft("plugins", "check", tmp_path, "--only", "is_fine")
    assert (ran.code, "no such check" in ran.err) == (2, True)
    ran = regraft("plugins", "check", tmp_path, "--family", "lama")
    assert (ran.code, 'did you mean "llama"' in ran.err) == (2, True)


def test_check_of_an_installed_plugin_by_its_name():
    ran = done("plugins", "check", "grow", "--only", "refuses_unknown_parameters", "--json")
    assert list(ran.json["transformations"]) == ["grow"]
