"""What README and manual show is so: their console blocks are run, their recipes checked, their Python compiled."""

from __future__ import annotations

import ast
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
import tomli

from tests.manual.blocks import Command, blocks, commands, difference, same
from tests.running import regraft

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(page):
    return page.relative_to(ROOT).as_posix()


def with_language(*languages):
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


@pytest.mark.parametrize("page", with_language("console"), ids=name)
def test_console_blocks(page, tmp_path):
    """In an empty folder, with the files that the page shows under a title, in order."""
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}", "COLUMNS": "200", "NO_COLOR": "1"}
    environment |= {"REGRAFT_CACHE": str(tmp_path / ".cache"), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    folder = tmp_path / "page"
    folder.mkdir()
    for block in blocks(page):
        if block.title is not None:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        for step in commands(block) if block.language == "console" else ():
            ran = subprocess.run(
                ["bash", "-c", step.command], cwd=folder, env=environment, capture_output=True, text=True, check=False,
                timeout=240,
            )  # fmt: skip
            wrong = difference(step.expected, ran.stdout.splitlines())
            assert wrong is None, f"{name(page)}: $ {step.command}\n{wrong}\n{ran.stderr}"
            assert ran.returncode == 0, f"{name(page)}: $ {step.command}\n{ran.stdout}\n{ran.stderr}"


@pytest.mark.parametrize("page", with_language("toml"), ids=name)
def test_recipes(page, tmp_path, monkeypatch):
    """A TOML block is TOML; the keys of its steps are known, whatever files they name."""
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks(page)):
        if block.language != "toml":
            continue
        document = tomli.loads(block.text)
        if "steps" not in document:
            continue
        text = block.text if "base" in document else f'[base]\nmodel = "demo:tiny"\n{block.text}'
        file = tmp_path / f"block{number}.toml"
        file.write_text(text)
        ran = regraft("check", file, "--recipe-only", "--json")
        problems = [] if ran.code == 0 else ran.events[-1].get("problems", [ran.events[-1]])
        wrong = [problem for problem in problems if "no such file" not in str(problem)]
        assert not wrong, f"{name(page)}: {wrong}"


@pytest.mark.parametrize("page", with_language("python"), ids=name)
def test_python_compiles_and_its_imports_exist(page):
    for block in blocks(page):
        if block.language != "python" or "): ..." in block.text:
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "regraft":
                imported = __import__(node.module, fromlist=["_"])
                assert all(hasattr(imported, alias.name) for alias in node.names)


def test_the_comparison_of_lines():
    assert same("wrote out: 2.16 MB in 1.0 s", "wrote out: 2.17 MB in 31.5 s")
    assert same("bpb 1.2941  1.24 .. 1.34", "bpb   1.3100 1.25 .. 1.33")
    assert not same("bpb 1.2941", "bpb 1.9")
    assert not same("exactly 2134078 bytes", "exactly 2134079 bytes")
    assert not same("a b", "a c")
    assert difference(("a", "...", "d"), ["a", "b", "c", "d"]) is None
    assert difference(("a", "..."), ["a", "b"]) is None
    assert "nothing more" in difference(("a", "b"), ["a"])
    assert "says more" in difference(("a",), ["a", "b"])
    assert commands(blocks_of("$ one \\\n    two\nout\n$ three\n")) == [
        Command("one \\\n    two", ("out",)), Command("three", ()),
    ]  # fmt: skip


def blocks_of(text):
    from tests.manual.blocks import Block

    return Block("console", None, text)
