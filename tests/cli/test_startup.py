"""What costs nothing: no torch, no transformers, and little time, where no tensor is touched."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ABF, write_recipe

PROBE = """
import json, os, resource, sys
from regraft.cli.main import run
code = 0
try:
    run(sys.argv[1:])
except SystemExit as ending:
    code = ending.code
usage = resource.getrusage(resource.RUSAGE_SELF)
heavy = sorted({"torch", "transformers", "numpy", "tokenizers"} & set(sys.modules))
facts = {"code": code, "heavy": heavy, "cpu": usage.ru_utime + usage.ru_stime}
sys.stdout.flush()
print(json.dumps(facts), file=sys.stderr)
"""
CPU_SECONDS = 1.5
"""Far above what it takes on a quiet machine (0.1 to 0.35 s), below an import of torch or transformers (2 to 5 s)."""


def probe(*arguments):
    ran = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True, check=False)
    return json.loads(ran.stderr.splitlines()[-1]), ran.stdout


def light(facts, code=0):
    assert facts["code"] == code
    assert facts["heavy"] == []
    assert facts["cpu"] < CPU_SECONDS


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["apply", "--help"],
        ["generate", "--help"],
        ["eval", "--help"],
        ["plugins"],
        ["schema"],
    ],
)
def test_commands_that_open_nothing(arguments):
    facts, out = probe(*arguments)
    light(facts)
    assert out


def test_check_and_plan_and_inspect_of_a_folder(workplace):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out", dtype="bfloat16", shard_size="50KB")
    for arguments in (["check", "recipe.toml"], ["plan", "recipe.toml", "--tensors"], ["inspect", "base"]):
        facts, out = probe(*arguments)
        light(facts)
        assert out


def test_plan_of_a_merge(workplace, tmp_path):
    from tests.adapters import write_adapter

    write_adapter("adapter")
    write_recipe(Path("recipe.toml"), "base", {"use": "lora-merge", "adapter": "adapter"}, path="out")
    light(probe("plan", "recipe.toml")[0])


def test_an_apply_that_computes_nothing(workplace):
    write_recipe(Path("recipe.toml"), "base", ABF, path="out")
    light(probe("apply", "recipe.toml")[0])
    light(probe("apply", "recipe.toml", "--force", "--link")[0])
    light(probe("verify", "out")[0])


def test_an_invalid_recipe(workplace):
    Path("recipe.toml").write_text('[base]\nmodel = 1\n[[steps]]\nuse = "lofti"\n')
    light(probe("apply", "recipe.toml")[0], code=2)
