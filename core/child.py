"""A script run in a process of its own, isolated and offline, that prints one JSON object as its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def run_script(
    script: str, *arguments: str, timeout_seconds: float, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What `python -I script arguments...` prints last; `{"error": ...}` if it prints no JSON or takes too long.

    Args:
        script: path of the script; standard input is closed.
        arguments: of the script.
        timeout_seconds: after which it is ended.
        variables: environment variables beside this process's own and those that keep it offline.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", script, *arguments],
            env={**os.environ, **OFFLINE, **(variables or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_seconds} s"}
    try:
        report: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"the process ended with status {done.returncode}: {done.stderr.strip()[-300:]}"}
    return report
