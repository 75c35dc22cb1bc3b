"""The Fourier head beside the paper: its toy table, a sweep over frequencies, and speed and memory of one layer.

    python benchmarks/fourier_head.py [--small] [--write docs/benchmarks.md] [--plots docs/concepts]
    python benchmarks/fourier_head.py table | sweep | speed [--small]         one part, printed

`table`: linear, mixture and Fourier head on three data sets with seeds 1, 2, 3, 42, 500 epochs, in one process and one
stack. `sweep`: 2 to 20 frequencies likewise. Both run at once, on a core each, after `speed`, which has the machine to
itself. `--small` is a smoke test: few epochs and rounds, no plots; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from document import machine, write_section
from fourier_head_toy import centres, figures
from torch.nn import functional as F

from regraft.core.plots import line_chart
from regraft.kernels.fourier_logits import fourier_logits
from regraft.kernels.fourier_nll import fourier_nll

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1, 2, 3, 42)
SETS = ("gaussian", "gmm2", "beta")
TABLE = ("linear", "gmm", "fourier-12")
COUNTS = tuple(range(2, 21, 2))
EPOCHS, SMALL_EPOCHS = 500, 2
AUTHORS = {
    "gaussian": {"linear": (0.1695, 0.1162), "gmm": (0.0260, 0.0678), "fourier-12": (0.1163, 0.0569)},
    "gmm2": {"linear": (0.2376, 0.0680), "gmm": (0.0300, 0.0425), "fourier-12": (0.1459, 0.0376)},
    "beta": {"linear": (0.2342, 0.1274), "gmm": (0.4070, 0.0607), "fourier-12": (0.1914, 0.0765)},
}
"""KL and smoothness, means over the four seeds of the results in the authors' repository (500 epochs)."""
AUTHORS_SWEEP = {
    "gaussian": (0.563, 0.197, 0.095, 0.100, 0.098, 0.116, 0.087, 0.133, 0.087, 0.113),
    "gmm2": (0.385, 0.174, 0.129, 0.141, 0.161, 0.146, 0.211, 0.205, 0.196, 0.169),
    "beta": (0.847, 0.548, 0.383, 0.282, 0.225, 0.191, 0.172, 0.159, 0.167, 0.169),
}
"""KL by number of frequencies, likewise."""


def heads_of(work: str) -> Sequence[str]:
    return TABLE if work == "table" else [f"fourier-{count}" for count in COUNTS]


def table(found: Mapping[str, Any], epochs: int, plots: Path | None) -> list[str]:
    """All heads on all data sets."""
    seeds = ", ".join(map(str, SEEDS))
    lines = [
        f"{epochs} epochs, seeds {seeds}: mean ± standard deviation over seeds (smoothness: mean); in brackets the",
        "authors' figures for 500 epochs.",
        "",
        "| data | figure | " + " | ".join(TABLE) + " | true density |",
        "|---|---|" + "---|" * len(TABLE) + "---|",
    ]
    for name in SETS:
        for place, figure in enumerate(("kl", "smoothness")):
            cells = []
            for head in TABLE:
                values = found[head][name][figure]
                spread = f" ± {statistics.stdev(values):.4f}" if figure == "kl" else ""
                cells.append(f"{statistics.mean(values):.4f}{spread} ({AUTHORS[name][head][place]:.4f})")
            truth = "" if figure == "kl" else f"{found['fourier-12'][name]['truth']:.4f}"
            lines.append(f"| {name} | {'KL' if figure == 'kl' else figure} | {' | '.join(cells)} | {truth} |")
    if plots is not None:
        for name in SETS:
            places = centres().tolist()
            series = {"true": (places, found["fourier-12"][name]["true"])}
            series |= {head: (places, found[head][name]["shown"]) for head in TABLE}
            chart = line_chart(series, title=f"{name}: one held-out point, seed 1", x="z", y="mass of the bin")
            (plots / f"fourier-head-{name}.png").write_bytes(chart)
    return [*lines, "", spent(found, len(TABLE))]


def sweep(found: Mapping[str, Any], epochs: int, plots: Path | None) -> list[str]:
    """KL and smoothness over the number of frequencies."""
    lines = [
        f"{epochs} epochs, four seeds: KL / smoothness, in brackets the authors' KL.",
        "",
        "| frequencies | " + " | ".join(SETS) + " |",
        "|---|" + "---|" * len(SETS),
    ]
    curves: dict[str, dict[str, list[float]]] = {"kl": {}, "smoothness": {}}
    for place, count in enumerate(COUNTS):
        cells = []
        for name in SETS:
            result = found[f"fourier-{count}"][name]
            means = {key: statistics.mean(result[key]) for key in curves}
            for key, value in means.items():
                curves[key].setdefault(name, []).append(value)
            cells.append(f"{means['kl']:.3f} / {means['smoothness']:.4f} ({AUTHORS_SWEEP[name][place]:.3f})")
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    if plots is not None:
        for key, lists in curves.items():
            series = {name: ([float(n) for n in COUNTS], values) for name, values in lists.items()}
            chart = line_chart(series, title=f"{key} over frequencies, {epochs} epochs", x="frequencies", y=key)
            (plots / f"fourier-head-{key}.png").write_bytes(chart)
    return [*lines, "", spent(found, len(COUNTS))]


def spent(found: Mapping[str, Any], heads: int) -> str:
    return f"All {heads * len(SETS) * len(SEEDS)} networks: {found['seconds']['cpu']:.0f} CPU seconds, in one process."


SIZES = ((32, 50, 12, 32), (256, 1024, 64, 64), (256, 4096, 550, 8))
"""Hidden size, bins, frequencies, rows."""
FORMS = ("paper", "all bins", "one bin")


def step_of(form: str, hidden: int, bins: int, frequencies: int, rows: int) -> Callable[[], float]:
    """One forward and backward pass of a linear layer, the head and its loss."""
    sys.path.insert(0, str(ROOT))
    from tests.plugins.fourier_head.paper_layer import paper_loss

    torch.manual_seed(0)
    layer = torch.nn.Linear(hidden, 2 * (frequencies + 1))
    states, labels = torch.randn(rows, hidden), torch.randint(0, bins, (rows,))

    def step() -> float:
        layer.zero_grad()
        coefficients = layer(states)
        if form == "paper":
            loss = paper_loss(coefficients, labels, bins)
        elif form == "all bins":
            loss = F.cross_entropy(fourier_logits(coefficients, bins, floor=1e-5 * bins), labels)
        else:
            loss = fourier_nll(coefficients, labels, bins, floor=1e-5 * bins)
        loss.backward()
        return loss.item()

    return step


def timing(form: str, size: Sequence[int], steps: int) -> dict[str, float]:
    """CPU seconds of a step, peak bytes above what stood before, the loss; runs in the child."""
    torch.set_num_threads(1)
    step_of(form, 8, 16, 3, 4)()
    step = step_of(form, *size)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    loss, seconds = step(), []
    for _ in range(steps):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(seconds), "peak": max(0, peak - before), "loss": loss}


def speed(rounds: int) -> list[str]:
    """Forms take turns, each sample a process of its own; medians."""
    lines = [
        "| d, bins, frequencies, rows | form | CPU ms | times faster | peak MB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        samples: dict[str, list[dict[str, float]]] = {form: [] for form in FORMS}
        for _ in range(rounds):
            for form in FORMS:
                steps = 5 if form == "paper" and size[1] > 1000 else 50
                samples[form].append(json.loads(child("time", form, json.dumps(size), str(steps)).communicate()[0]))
        paper = statistics.median(item["seconds"] for item in samples["paper"])
        for form, items in samples.items():
            taken, peak = (statistics.median(item[key] for item in items) for key in ("seconds", "peak"))
            lines.append(
                f"| {', '.join(map(str, size))} | {form} | {taken * 1e3:.2f} | {paper / taken:.1f} | {peak / 1e6:.0f} "
                f"| {items[0]['loss']:.6f} |"
            )
    return lines


def child(*arguments: str) -> subprocess.Popen[str]:
    """This script, once more; prints JSON."""
    return subprocess.Popen([sys.executable, __file__, "child", *arguments], stdout=subprocess.PIPE, text=True)


def in_child(work: str, *arguments: str) -> None:
    """What the child prints."""
    if work == "time":
        form, size, steps = arguments
        print(json.dumps(timing(form, json.loads(size), int(steps))))
        return
    torch.set_num_threads(1)
    print(json.dumps(figures(heads_of(work), SETS, SEEDS, int(arguments[0]))))


def trained(works: Sequence[str], epochs: int, plots: Path | None) -> dict[str, list[str]]:
    """Table and sweep, at once."""
    running = {work: child(work, str(epochs)) for work in works}
    found = {work: process.communicate()[0] for work, process in running.items()}
    if any(process.returncode for process in running.values()):
        raise SystemExit("a training failed")
    return {
        work: (table if work == "table" else sweep)(json.loads(text), epochs, plots) for work, text in found.items()
    }


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        in_child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="?", choices=("all", "table", "sweep", "speed"), default="all")
    parser.add_argument("--small", action="store_true", help="a smoke test: the figures mean nothing")
    parser.add_argument("--write", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "concepts", help="folder for the plots")
    options = parser.parse_args()
    epochs, plots = (SMALL_EPOCHS, None) if options.small else (EPOCHS, options.plots)
    parts, started = {}, time.monotonic()
    if options.work in ("all", "speed"):
        parts["speed"] = speed(1 if options.small else 3)
        print("\n".join(parts["speed"]), "\n", flush=True)
    works = [work for work in ("table", "sweep") if options.work in ("all", work)]
    if works:
        parts |= trained(works, epochs, plots)
    print("\n\n".join("\n".join(parts[work]) for work in works), flush=True)
    if options.work == "all":
        write_section(options.write, "Fourier head", section(parts, time.monotonic() - started))


def section(parts: Mapping[str, Sequence[str]], seconds: float) -> list[str]:
    """The section of docs/benchmarks.md."""
    images = [f"![{name}](concepts/fourier-head-{name}.png)" for name in (*SETS, "kl", "smoothness")]
    return [
        machine("torch"),
        "The paper is arXiv 2410.22269, the authors' figures are those in their repository.",
        f"All of this took {seconds / 60:.1f} minutes.",
        "",
        "### The paper's toy",
        "",
        "50 bins; an MLP whose head is linear, a mixture of Gaussians, or Fourier with 12 frequencies; KL to the true",
        "distribution, and roughness (lower is smoother), of held-out points.",
        "",
        *parts["table"],
        "",
        *images[:3],
        "",
        "### Frequencies",
        "",
        *parts["sweep"],
        "",
        *images[3:],
        "",
        "### One layer",
        "",
        "Forward and backward with the loss, against the layer written as the paper describes it (autocorrelation by",
        "convolution, rows × bins × frequencies exponentials); one thread, medians of processes in turn, memory above",
        "what stood before. `one bin` is the loss that `train` takes, `all bins` one FFT.",
        "",
        *parts["speed"],
    ]


if __name__ == "__main__":
    main()
