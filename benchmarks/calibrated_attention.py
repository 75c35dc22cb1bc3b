"""Time and peak memory of calibrated attention beside torch's fused attention and a dense form written from the paper.

    python benchmarks/calibrated_attention.py [--small] [--write docs/benchmarks.md] [--heads 4] [--width 64]

Lengths 512 to 16384 (small: to 2048, in one round). Every sample is a process of its own: operands with a sink, one
small call that loads what it needs, then the calls. Memory is what the calls need at their peak above the operands: on
a CPU by the kernel's accounting (ru_maxrss), on CUDA what torch allocated; it includes the output. Seconds are the
least of some calls: of processor time on a CPU, of wall time on CUDA.
The dense form holds a few matrices of length x length for each head, and is left out where they are above --dense-gb.
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

import torch
from document import machine, write_section
from torch.nn import functional as F

from regraft.kernels.calibrated_attention import Calibration, calibrated_attention

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SMALL = LENGTHS[:3]
FORMS = ("fused, not calibrated", "causal scope", "prompt scope", "dense, from the paper")
_DENSE_COPIES = 5


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, beta: float = 0.4, tau: float = 0.1
) -> torch.Tensor:
    """The paper's redistribution, whose sinks are columns with a mean above tau over the rows that see them."""
    length = query.shape[2]
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    unseen = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weights = scores.masked_fill_(unseen, -torch.inf).softmax(-1)
    means = weights.sum(-2) / torch.arange(length, 0, -1, device=query.device)
    sinks = (means > tau)[:, :, None]
    sinks[..., 0] = False
    on_sinks = (weights * sinks).sum(-1, keepdim=True)
    added = weights * ((1 - beta) * on_sinks / (1 - on_sinks))
    return torch.where(sinks, beta * weights, weights + added) @ value


def form_of(name: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The function of that name, of query, key and value."""
    if name == "fused, not calibrated":
        return lambda *some: F.scaled_dot_product_attention(*some, is_causal=True)
    if name == "dense, from the paper":
        return dense
    calibration = Calibration(causal=name == "causal scope")
    return lambda *some: calibrated_attention(*some, calibration)[0]


def operands(length: int, heads: int, width: int, dtype: str, device: str) -> tuple[torch.Tensor, ...]:
    """Keys 0 and 40 draw about half of the weight of every row."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, width) for _ in range(3))
    direction = F.normalize(torch.randn(width), dim=0)
    query += 4 * direction
    key -= 1.5 * direction
    key[:, :, [0, 40]] = direction * (torch.tensor(length).log() - 1) * width**0.5 / 4
    return tuple(one.to(device, getattr(torch, dtype)) for one in (query, key, value))


def sample(name: str, length: int, heads: int, width: int, dtype: str, device: str, calls: int) -> dict[str, float]:
    """Peak bytes above the operands, and seconds of a call; runs in the child."""
    form, some = form_of(name), operands(length, heads, width, dtype, device)
    cuda = device.startswith("cuda")
    clock = time.perf_counter if cuda else time.process_time
    with torch.no_grad():
        form(*operands(64, heads, width, dtype, device))
        before = torch.cuda.memory_allocated() if cuda else rss()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(calls):
            begun = clock()
            form(*some)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(clock() - begun)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak - before, "seconds": min(seconds)}


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def in_child(name: str, length: int, arguments: argparse.Namespace) -> dict[str, float]:
    given = (length, arguments.heads, arguments.width, arguments.dtype, arguments.device, arguments.calls)
    command = [sys.executable, __file__, "--child", name, *map(str, given)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def table(arguments: argparse.Namespace) -> str:
    """Rounds take turns; the rows are their medians."""
    samples: dict[tuple[int, str], list[dict[str, float]]] = {}
    rounds = 1 if arguments.small else arguments.rounds
    for _ in range(rounds):
        for length in SMALL if arguments.small else LENGTHS:
            for name in FORMS:
                matrices = _DENSE_COPIES * arguments.heads * length**2 * (4 if arguments.dtype == "float32" else 2)
                if name != FORMS[-1] or matrices <= arguments.dense_gb * 1e9:
                    samples.setdefault((length, name), []).append(in_child(name, length, arguments))
    shape = f"{arguments.heads} calibrated heads of {arguments.width}, {arguments.dtype}, {arguments.device}"
    drawn = "the first key and one sink draw about half of the weight"
    lines = [
        f"{shape}, threads: {torch.get_num_threads()}; {drawn}. Medians, rounds: {rounds}.",
        "",
        "| length | form | seconds | x fused | peak above operands, MB |",
        "|---|---|---|---|---|",
    ]
    for (length, name), some in samples.items():
        seconds, peak = (statistics.median(one[key] for one in some) for key in ("seconds", "peak"))
        fused = statistics.median(one["seconds"] for one in samples[length, FORMS[0]])
        lines.append(f"| {length} | {name} | {seconds:.4f} | {seconds / fused:.2f} | {peak / 1e6:.1f} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        name, length, heads, width, dtype, device, calls = sys.argv[2:]
        print(json.dumps(sample(name, int(length), int(heads), int(width), dtype, device, int(calls))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a smoke test: lengths to 2048, one round")
    parser.add_argument("--write", type=Path, default=Path("docs/benchmarks.md"))
    for name, default in (("heads", 4), ("width", 64), ("rounds", 3), ("calls", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dense-gb", type=float, default=3.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    arguments = parser.parse_args()
    lines = table(arguments)
    print(lines)
    write_section(arguments.write, "Calibrated attention", [machine("torch"), "", lines])


if __name__ == "__main__":
    main()
