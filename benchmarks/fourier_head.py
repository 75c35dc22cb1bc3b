"""The Fourier head beside the paper: its toy table, a sweep over frequencies, and speed and memory of one layer.

    python benchmarks/fourier_head.py table [short] [--plots DIR]     500 epochs (short: 50), all seeds and data sets
    python benchmarks/fourier_head.py sweep [short] [--plots DIR]     2 to 20 frequencies, two seeds
    python benchmarks/fourier_head.py speed [--rounds 5]              forward and backward, peak memory

The toy of the paper (arXiv 2410.22269, section 4): 5000 points, 4000 to train on, two numbers in and a third's bin out,
an MLP 2-64-32-head with ReLU, Adam at 1e-3, batch 32, 50 bins, seeds 1, 2, 3, 42. All runs of one head are trained at
once, stacked along a leading axis, each with its own data, start and order; one process for each head.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from regraft.core.plots import line_chart
from regraft.kernels.fourier_logits import fourier_logits
from regraft.kernels.fourier_nll import fourier_nll
from regraft.plugins.fourier_head.metrics import divergence, smoothness

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (1, 2, 3, 42)
SETS = ("gaussian", "gmm2", "beta")
BINS, POINTS, TRAINED, BATCH, VARIANCE, FLOOR = 50, 5000, 4000, 32, 0.01, 50e-5
EPOCHS, SHORT_EPOCHS = 500, 50
AUTHORS = {
    "gaussian": {"linear": (0.1695, 0.1162), "gmm": (0.0260, 0.0678), "fourier-12": (0.1163, 0.0569)},
    "gmm2": {"linear": (0.2376, 0.0680), "gmm": (0.0300, 0.0425), "fourier-12": (0.1459, 0.0376)},
    "beta": {"linear": (0.2342, 0.1274), "gmm": (0.4070, 0.0607), "fourier-12": (0.1914, 0.0765)},
}
"""KL and smoothness, means over the four seeds of the results in the authors' repository (500 epochs)."""


@dataclass(frozen=True)
class Data:
    """Inputs [R, n, 2] as bin numbers, labels [R, n], and for the held-out points true masses [R, n, BINS]."""

    inputs: torch.Tensor
    labels: torch.Tensor
    held_inputs: torch.Tensor
    held_masses: torch.Tensor


def centres() -> torch.Tensor:
    return -1 + (2 * torch.arange(BINS, dtype=torch.float64) + 1) / BINS


def bin_of(values: torch.Tensor) -> torch.Tensor:
    return ((values + 1) / 2 * BINS).floor().long().clamp(0, BINS - 1)


def points(name: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y, z [POINTS], and the true masses of z given x and y [POINTS, BINS]."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(POINTS, generator=generator, dtype=torch.float64) * 1.6 - 0.8

    def normal(middle: torch.Tensor) -> torch.Tensor:
        return middle + math.sqrt(VARIANCE) * torch.randn(POINTS, generator=generator, dtype=torch.float64)

    def bell(middle: torch.Tensor) -> torch.Tensor:
        return torch.exp(-((centres() - middle[:, None]) ** 2) / (2 * VARIANCE))

    x = uniform()
    if name == "gmm2":
        y = uniform()
        z = normal(torch.where(torch.rand(POINTS, generator=generator) < 0.5, x, y))
        return x, y, z, normed(normed(bell(x)) + normed(bell(y)))
    y = normal(x)
    if name == "gaussian":
        return x, y, normal(y), normed(bell(y))
    first, second = (100 * item.abs().clamp_min(1e-6) for item in (x, y))
    torch.manual_seed(seed)  # distributions draw from the global generator
    drawn = torch.distributions.Beta(first, second).sample()
    sign = torch.where(torch.rand(POINTS, generator=generator) < 0.5, 1.0, -1.0)
    places = centres().abs()
    logs = (first - 1)[:, None] * places.log() + (second - 1)[:, None] * (1 - places).log()
    return x, y, sign * drawn, normed(torch.exp(logs - logs.amax(1, keepdim=True)))


def normed(masses: torch.Tensor) -> torch.Tensor:
    return masses / masses.sum(-1, keepdim=True)


def data_of(runs: Sequence[tuple[str, int]]) -> Data:
    parts = []
    for name, seed in runs:
        x, y, z, masses = points(name, seed)
        order = torch.randperm(POINTS, generator=torch.Generator().manual_seed(42))
        inputs = torch.stack([bin_of(x), bin_of(y)], 1)[order].float()
        parts.append((inputs, bin_of(z)[order], masses[order]))
    inputs, labels, masses = (torch.stack(item) for item in zip(*parts, strict=True))
    return Data(inputs[:, :TRAINED], labels[:, :TRAINED], inputs[:, TRAINED:], masses[:, TRAINED:])


class Stack:
    """R networks of one shape, trained side by side."""

    def __init__(self, runs: int, outputs: int, head: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.head = head
        self.parameters = []
        for rows, columns, scale in ((64, 2, 1.0), (32, 64, 1.0), (outputs, 32, 0.01 if "fourier" in head else 1.0)):
            bound = columns**-0.5  # as nn.Linear begins; the paper divides the Fourier head's by 100
            for shape in ((runs, columns, rows), (runs, 1, rows)):
                values = (torch.rand(shape, generator=generator) * 2 - 1) * bound * scale
                self.parameters.append(values.requires_grad_())
        if head == "gmm":
            width = math.log(math.expm1(2 / BINS))
            self.parameters.append(torch.full((runs, 1, outputs), width).requires_grad_())

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        first, one, second, two, third, three, *_ = self.parameters
        hidden = torch.baddbmm(one, inputs, first).relu()
        return torch.baddbmm(three, torch.baddbmm(two, hidden, second).relu(), third)

    def loss(self, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed over runs, mean over each run's batch."""
        outputs, labels = self.outputs(inputs).flatten(0, 1), labels.flatten()
        if "fourier" in self.head:
            total = fourier_nll(outputs, labels, BINS, floor=FLOOR, reduction="sum")
        elif self.head == "linear":
            total = F.cross_entropy(outputs, labels, reduction="sum")
        else:
            total = F.nll_loss(
                self._mixture(outputs.view(*inputs.shape[:2], -1)).flatten(0, 1), labels, reduction="sum"
            )
        return total / inputs.shape[1]

    @torch.no_grad()
    def masses(self, inputs: torch.Tensor) -> torch.Tensor:
        """[R, n, BINS]."""
        outputs = self.outputs(inputs)
        if "fourier" in self.head:
            return fourier_logits(outputs.flatten(0, 1), BINS, floor=FLOOR).exp().view(*inputs.shape[:2], BINS)
        return outputs.softmax(-1) if self.head == "linear" else self._mixture(outputs).exp()

    def _mixture(self, outputs: torch.Tensor) -> torch.Tensor:
        """Log-masses: equal parts, means in (-1, 1), widths that all inputs share; in logarithms: none vanishes."""
        middles, widths = outputs.tanh()[..., None], F.softplus(self.parameters[-1])[..., None]
        bells = -0.5 * ((centres().float() - middles) / widths) ** 2 - widths.log()
        return bells.logsumexp(-2).log_softmax(-1)


def outputs_of(head: str, runs: Sequence[tuple[str, int]]) -> int:
    if head.startswith("fourier"):
        return 2 * (int(head.partition("-")[2]) + 1)
    return BINS if head == "linear" else 1 if runs[0][0] == "gaussian" else 2


def train(head: str, runs: Sequence[tuple[str, int]], epochs: int) -> tuple[Data, torch.Tensor]:
    """The data, and the masses [R, n, BINS] that the trained heads give to held-out points."""
    data = data_of(runs)
    stack = Stack(len(runs), outputs_of(head, runs), head)
    optimizer = torch.optim.Adam(stack.parameters, lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(len(runs))[:, None]
    for _ in range(epochs):
        order = torch.rand(len(runs), TRAINED, generator=generator).argsort(1)
        inputs, labels = data.inputs[row, order], data.labels[row, order]
        for start in range(0, TRAINED, BATCH):
            loss = stack.loss(inputs[:, start : start + BATCH], labels[:, start : start + BATCH])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return data, stack.masses(data.held_inputs)


def figures(head: str, names: Sequence[str], seeds: Sequence[int], epochs: int) -> dict[str, object]:
    """KL by seed and smoothness, by data set; a few densities for the plot; runs in the child."""
    torch.set_num_threads(1)
    runs = [(name, seed) for name in names for seed in seeds]
    started = time.process_time()
    data, predicted = train(head, runs, epochs)
    seconds = time.process_time() - started
    found: dict[str, object] = {"seconds": seconds}
    for name in names:
        own = [index for index, run in enumerate(runs) if run[0] == name]
        kl = divergence(data.held_masses[own], predicted[own].double()).mean(1)
        show = int((data.held_inputs[own[0]] - torch.tensor([10.0, 35.0])).square().sum(1).argmin())
        found[name] = {
            "kl": kl.tolist(),
            "smoothness": smoothness(predicted[own]).mean(1).tolist(),
            "truth": smoothness(data.held_masses[own]).mean().item(),
            "shown": predicted[own[0], show].tolist(),
            "true": data.held_masses[own[0], show].tolist(),
        }
    return found


def children(jobs: Sequence[Sequence[object]]) -> list[dict]:
    """The figures of each job, all jobs at once."""
    commands = [[sys.executable, __file__, "child", *map(str, job)] for job in jobs]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a training failed")
    return [json.loads(output) for output in outputs]


def table(epochs: int, plots: Path | None) -> str:
    """All heads on all data sets."""
    every, seeds = ",".join(SETS), ",".join(map(str, SEEDS))
    jobs = [("fourier-12", every, seeds, epochs), ("linear", every, seeds, epochs)]
    jobs += [("gmm", "gaussian", seeds, epochs), ("gmm", "gmm2,beta", seeds, epochs)]
    fourier, linear, one, two = children(jobs)
    found = {"linear": linear, "gmm": {**two, "gaussian": one["gaussian"]}, "fourier-12": fourier}
    protocol = f"{epochs} epochs, seeds {seeds}: mean ± standard deviation over seeds (smoothness: mean)"
    lines = [
        f"{protocol}; in brackets the authors' figures for 500 epochs.",
        "",
        "| data | figure | " + " | ".join(found) + " | true density |",
        "|---|---|" + "---|" * len(found) + "---|",
    ]
    for name in SETS:
        for place, figure in enumerate(("kl", "smoothness")):
            cells = []
            for head, results in found.items():
                values = results[name][figure]
                spread = f" ± {statistics.stdev(values):.4f}" if figure == "kl" else ""
                cells.append(f"{statistics.mean(values):.4f}{spread} ({AUTHORS[name][head][place]:.4f})")
            truth = "" if figure == "kl" else f"{fourier[name]['truth']:.4f}"
            lines.append(f"| {name} | {'KL' if figure == 'kl' else figure} | {' | '.join(cells)} | {truth} |")
    cpu = {head: results["seconds"] for head, results in (("fourier-12", fourier), ("linear", linear))}
    cpu["gmm"] = one["seconds"] + two["seconds"]
    lines += ["", "CPU seconds for all runs: " + ", ".join(f"{head} {spent:.0f}" for head, spent in cpu.items()) + "."]
    if plots is not None:
        for name in SETS:
            places = centres().tolist()
            series = {"true": (places, fourier[name]["true"])}
            series |= {head: (places, results[name]["shown"]) for head, results in found.items()}
            chart = line_chart(series, title=f"{name}: one held-out point, seed 1", x="z", y="mass of the bin")
            (plots / f"fourier-head-{name}.png").write_bytes(chart)
    return "\n".join(lines)


def sweep(epochs: int, plots: Path | None) -> str:
    """KL and smoothness over the number of frequencies."""
    counts = range(2, 21, 2)
    lines = [f"{epochs} epochs, seeds 1, 2: KL / smoothness.", ""]
    lines += ["| frequencies | " + " | ".join(SETS) + " |", "|---|" + "---|" * len(SETS)]
    results = []
    for start in range(0, len(counts), 2):
        results += children([(f"fourier-{n}", ",".join(SETS), "1,2", epochs) for n in counts[start : start + 2]])
    curves: dict[str, dict[str, list[float]]] = {"kl": {}, "smoothness": {}}
    for n, result in zip(counts, results, strict=True):
        means = {key: {name: statistics.mean(result[name][key]) for name in SETS} for key in curves}
        lines.append(
            f"| {n} | " + " | ".join(f"{means['kl'][s]:.3f} / {means['smoothness'][s]:.4f}" for s in SETS) + " |"
        )
        for key, lists in curves.items():
            for name in SETS:
                lists.setdefault(name, []).append(means[key][name])
    if plots is not None:
        for key, lists in curves.items():
            series = {name: ([float(n) for n in counts], values) for name, values in lists.items()}
            chart = line_chart(series, title=f"{key} over frequencies, {epochs} epochs", x="frequencies", y=key)
            (plots / f"fourier-head-{key}.png").write_bytes(chart)
    return "\n".join(lines)


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


def speed(rounds: int) -> str:
    """Forms take turns, each sample a process of its own; medians."""
    lines = [
        "| d, bins, frequencies, rows | form | CPU ms | times faster | peak MB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        samples: dict[str, list[dict]] = {form: [] for form in FORMS}
        for _ in range(rounds):
            for form in FORMS:
                steps = 5 if form == "paper" and size[1] > 1000 else 50
                command = [sys.executable, __file__, "time", form, json.dumps(size), str(steps)]
                samples[form].append(json.loads(subprocess.check_output(command, text=True)))
        paper = statistics.median(item["seconds"] for item in samples["paper"])
        for form, items in samples.items():
            spent, peak = (statistics.median(item[key] for item in items) for key in ("seconds", "peak"))
            lines.append(
                f"| {', '.join(map(str, size))} | {form} | {spent * 1e3:.2f} | {paper / spent:.1f} | {peak / 1e6:.0f} "
                f"| {items[0]['loss']:.6f} |"
            )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        head, names, seeds, epochs = sys.argv[2:]
        print(json.dumps(figures(head, names.split(","), [int(seed) for seed in seeds.split(",")], int(epochs))))
        return
    if sys.argv[1:2] == ["time"]:
        print(json.dumps(timing(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=("table", "sweep", "speed"))
    parser.add_argument("form", nargs="?", choices=("short",), help="a tenth of the epochs")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    epochs = SHORT_EPOCHS if arguments.form else EPOCHS
    if arguments.work == "speed":
        print(speed(arguments.rounds))
    else:
        print((table if arguments.work == "table" else sweep)(epochs, arguments.plots))


if __name__ == "__main__":
    main()
