"""Peak memory and time of `linear_cross_entropy` beside `F.cross_entropy(F.linear(hidden, weight), labels)`, on a CPU.

    python benchmarks/linear_cross_entropy.py [--tokens 4096 --hidden 512 --vocab 32000] [--rounds 3] [--steps 3]

Every sample is a process of its own: operands, made in place so that no earlier peak hides the work's, a tiny step of
both forms to load what they need, then the steps. Memory is the peak RSS of the kernel's accounting (ru_maxrss) after
the steps less the RSS before them; it includes the gradients. Seconds are the median step, wall and CPU. Rounds take
turns; the table shows their medians.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

FORMS = ("plain", "ours")
WORK = ("head learns", "head frozen", "log-probs, head learns", "no gradients")


def sample(form: str, work: str, tokens: int, hidden: int, vocab: int, dtype: str, steps: int) -> dict[str, float]:
    """Peak bytes above the operands, wall and CPU seconds of a step, and the loss; runs in the child."""
    import torch

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    labels = torch.randint(0, vocab, (tokens,))
    states = torch.empty(tokens, hidden, dtype=kind).normal_().requires_grad_(work != "no gradients")
    weight = torch.empty(vocab, hidden, dtype=kind).normal_(std=hidden**-0.5).requires_grad_("learns" in work)
    for either in FORMS:
        step_of(either, work)(
            states.detach()[:8].requires_grad_(), weight.detach()[:16].requires_grad_(), labels[:8] % 16
        )
    step = step_of(form, work)
    resident, walls, processors = rss(), [], []
    for _ in range(steps):
        states.grad = weight.grad = None
        wall, processor = time.perf_counter(), time.process_time()
        loss = step(states, weight, labels)
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    timing = {"wall": statistics.median(walls), "cpu": statistics.median(processors)}
    return {"peak": peak_rss() - resident, "loss": loss, **timing}


def step_of(form: str, work: str) -> Callable[..., float]:
    """One forward pass, and a backward pass where the work has one; returns the loss."""
    import torch
    from torch.nn import functional as F

    from regraft.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if "log-probs" in work:
            if form == "ours":
                probs = linear_log_probs(hidden, weight, labels)
            else:
                probs = -F.cross_entropy(F.linear(hidden, weight), labels, reduction="none")
            return -F.logsigmoid(0.1 * (probs.view(2, -1).sum(1).diff())).sum()
        if form == "ours":
            return linear_cross_entropy(hidden, weight, labels)
        return F.cross_entropy(F.linear(hidden, weight), labels)

    def step(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> float:
        if work == "no gradients":
            with torch.no_grad():
                return loss_of(hidden, weight, labels).item()
        loss = loss_of(hidden, weight, labels)
        loss.backward()
        return loss.item()

    return step


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_child(arguments: argparse.Namespace, form: str, work: str) -> dict[str, float]:
    sizes = [str(getattr(arguments, name)) for name in ("tokens", "hidden", "vocab", "dtype", "steps")]
    command = [sys.executable, __file__, "--child", form, work, *sizes]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(results: dict[tuple[str, str], list[dict[str, float]]], arguments: argparse.Namespace) -> str:
    logits = arguments.tokens * arguments.vocab * (4 if arguments.dtype == "float32" else 2)
    sizes = f"{arguments.tokens} tokens, hidden size {arguments.hidden}, vocabulary {arguments.vocab}"
    lines = [
        f"{sizes}, {arguments.dtype}; the logits alone are {logits / 1e6:.0f} MB.",
        "",
        "| work | form | peak above operands, MB | wall, s | CPU, s | loss |",
        "|---|---|---|---|---|---|",
    ]
    for (work, form), samples in results.items():
        middle = {name: statistics.median(item[name] for item in samples) for name in samples[0]}
        lines.append(
            f"| {work} | {form} | {middle['peak'] / 1e6:.0f} | {middle['wall']:.2f} | {middle['cpu']:.2f} "
            f"| {middle['loss']:.6f} |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        form, work, tokens, hidden, vocab, dtype, steps = sys.argv[2:]
        print(json.dumps(sample(form, work, int(tokens), int(hidden), int(vocab), dtype, int(steps))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 4096), ("hidden", 512), ("vocab", 32000), ("rounds", 3), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for work in WORK:
            for form in FORMS:
                results.setdefault((work, form), []).append(in_child(arguments, form, work))
    print(table(results, arguments))


if __name__ == "__main__":
    main()
