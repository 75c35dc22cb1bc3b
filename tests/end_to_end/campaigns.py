"""Every campaign of this folder, as many at a time as there are cores, each in a process with one thread.

Usage: python tests/end_to_end/campaigns.py [short]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAMES = (
    "smollm2_training", "smollm2", "vlora_toy", "smollm2_vocabulary", "smollm2_eval", "smollm2_calibration",
    "smollm2_fourier", "smollm2_vlora", "forecast", "huge",
)  # fmt: skip
"""The longest first."""
LIMIT = 4 * 3600


def run(name: str, arguments: list[str]) -> tuple[str, int, str, float]:
    """One campaign: its name, exit code, output and seconds."""
    script = str(Path(__file__).with_name(f"{name}.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "REGRAFT_CACHE_SIZE": "0"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment, stdin=subprocess.DEVNULL, timeout=LIMIT, check=False,
    )  # fmt: skip
    return name, done.returncode, done.stdout, time.monotonic() - started


def main() -> None:
    """Print what each campaign says when it ends; exit with 1 if one failed."""
    failed = []
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for name, code, output, seconds in pool.map(lambda name: run(name, sys.argv[1:]), NAMES):
            print(f"--- {name}: {seconds:.0f} s\n{output.strip()}", flush=True)
            if code:
                failed.append(f"{name} ended with {code}")
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
