"""Ahead-of-time compilation of every shipped kernel, in a process of its own: no spills, vector loads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kernel_resources.py"


@pytest.mark.slow
def test_no_kernel_spills():
    triton = pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    usage = json.loads(done.stdout)
    assert {name.split()[-1] for name in usage} == {"sm_80", "sm_90"}
    for name, used in usage.items():
        assert used["local"] == 0, name
        assert used["stack"] <= (0 if Version(triton.__version__) >= Version("3.8") else 112), name
        assert used["registers"] <= 168, f"{name}: fewer than three blocks of 128 threads fit a multiprocessor"
        assert used["vector_loads"] > 0, name
