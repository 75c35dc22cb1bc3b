"""Forecasts of real time series with a Fourier head on demo:tiny, against the seasonal naive forecast.

Usage: python tests/end_to_end/forecast.py [short] [--keep DIR]

Three sets that statsmodels ships: yearly sunspots (1700 to 2008, a cycle of 11 years), monthly temperatures of the sea
off Peru (El Niño, 1950 to 2010), and CO2 on Mauna Loa (weekly, taken to monthly means, 1958 to 2001). One model learns
all three but the last 48 values of each, and forecasts 12 values from 16 origins among those. `short` learns El Niño
alone, in a third of the steps. The written folder also makes forecasts in a process that cannot import regraft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from smollm2 import regraft

RECIPE = """
[base]
model = "demo:tiny"

[[steps]]
use = "fourier-head"
bins = 128
range = [-5, 5]
num_frequencies = 24
series = { context = 48, horizon = 12, scaling = "standard", reserve = 48 }

[steps.train]
data = "series.jsonl"
weights = "full"
epochs = 100
steps = STEPS
batch_size = 16
lr = 2e-3
precision = "float32"
held_out = 0
"""
ALONE = """
import json, sys
sys.modules["regraft"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
known = torch.tensor([json.loads(open(sys.argv[2]).readline())["series"]])
paths = model.forecast(known, 12, samples=20, generator=torch.Generator().manual_seed(0))
assert paths.shape == (1, 20, 12) and paths.isfinite().all()
print(" ".join(f"{value:.0f}" for value in paths.median(1).values[0]))
"""


def series() -> dict[str, tuple[list[float], int]]:
    """Values and period by name."""
    from statsmodels import datasets

    sunspots = datasets.sunspots.load_pandas().data["SUNACTIVITY"]
    sea = datasets.elnino.load_pandas().data.drop(columns="YEAR")
    weekly = datasets.co2.load_pandas().data["co2"]
    monthly = weekly.resample("MS").mean().interpolate()
    return {
        "sunspots": (sunspots.tolist(), 11),
        "elnino": (sea.to_numpy().ravel().tolist(), 12),
        "co2": (monthly.tolist(), 12),
    }


def main() -> None:
    """Train, measure, and forecast without regraft."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", nargs="?", choices=["short"])
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    short = options.form == "short"
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        root.mkdir(parents=True, exist_ok=True)
        rows = {name: json.dumps({"series": values, "period": m}) for name, (values, m) in series().items()}
        rows = {"elnino": rows["elnino"]} if short else rows
        (root / "series.jsonl").write_text("\n".join(rows.values()))
        (root / "recipe.toml").write_text(RECIPE.replace("STEPS", "100" if short else "300"))
        started = time.monotonic()
        regraft("apply", root / "recipe.toml", "-o", root / "out", "--force", "--no-durable")
        print(f"trained and written in {time.monotonic() - started:.0f} s", flush=True)
        tasks = []
        for name, row in rows.items():
            (root / f"{name}.jsonl").write_text(row)
            tasks += ["--task", f"forecast:{root / name}.jsonl origins=16 step=2 id={name}"]
        if not short:
            tasks += ["--task", f"forecast:{root}/series.jsonl origins=16 step=2 id=all"]
        found = regraft("eval", root / "out", "--trust-remote-code", "--json", "--plots", root / "plots", *tasks)
        check(json.loads(found)["tasks"])
        (root / "alone.py").write_text(ALONE)
        command = [sys.executable, "-I", str(root / "alone.py"), str(root / "out"), str(root / "series.jsonl")]
        alone = subprocess.run(command, check=True, capture_output=True, text=True)
        print(f"without regraft, {next(iter(rows))} goes on with {alone.stdout.strip()}")


def check(tasks: list[dict[str, Any]]) -> None:
    """Print the figures; the seasonal naive forecast must be beaten."""
    names = ("crps", "naive_crps", "mase", "naive_mase", "coverage_50", "coverage_80", "coverage_95")
    print(f"| series | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for task in tasks:
        cells = (f"{task['figures'][name]['value']:.3f}" for name in names)
        print(f"| {task['task']} | {' | '.join(cells)} |", flush=True)
        for note in task["notes"]:
            print(f"  {note}")
    for task in tasks:
        value = {name: figure["value"] for name, figure in task["figures"].items()}
        assert value["crps"] < value["naive_crps"], task
        assert value["mase"] < value["naive_mase"], task
        assert value["coverage_95"] > 0.85, value


if __name__ == "__main__":
    main()
