"""The training section of docs/benchmarks.md: the loop, cross-entropy and LoFiT, each by its own script.

python benchmarks/training.py [--small] [--write docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from document import machine, write_section

PARTS = {
    "Training loop beside transformers.Trainer": ("training_loop.py", ["--small", "--rounds", "1"]),
    "Cross-entropy from hidden states and head": ("linear_cross_entropy.py", ["--tokens", "256", "--rounds", "1"]),
    "LoFiT, stage 2, beside a plain loop over heads": ("lofit_stage2.py", ["--small", "--rounds", "1"]),
}
"""Heading, script, and what makes it a smoke test."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a smoke test: the figures mean nothing")
    parser.add_argument("--write", type=Path, default=Path("docs/benchmarks.md"))
    options = parser.parse_args()
    lines = [
        machine("torch", "transformers", "accelerate"),
        "Medians of rounds in turn.",
    ]
    for heading, (script, small) in PARTS.items():
        command = [sys.executable, str(Path(__file__).with_name(script)), *(small if options.small else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(f"{heading}\n\n{done.stdout}", flush=True)
        lines += ["", f"### {heading}", "", done.stdout.strip()]
    write_section(options.write, "Training", lines)


if __name__ == "__main__":
    main()
