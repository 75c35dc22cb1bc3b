"""The low-rank update of a group of matrices: on CUDA bandwidth beside a copy of the same bytes, on a CPU time.

    python benchmarks/lora_merge.py [--matrices 32] [--size 4096] [--ranks 16 64]

Prints one row for every rank and rounding: seconds (best of ten), gigabytes a second of weights read and written, the
share of what a copy reaches, and the same for torch's own `addmm`, which rounds to nearest and works matrix by matrix.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from regraft.kernels.lora_merge import Merge, lora_merge_group

ROUNDS = 10


def best(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of some rounds, after one that does not count."""
    seconds = []
    for _ in range(ROUNDS + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=32)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    count, size = (options.matrices, options.size) if device == "cuda" else (1, 1024)
    weights = [torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(count)]
    moved = 2 * sum(weight.nbytes for weight in weights)
    elements = sum(weight.numel() for weight in weights)
    copied = best(lambda: [weight.clone() for weight in weights], device)
    print(f"{device}, {count} matrices of {size} x {size}, bf16; a copy reaches {moved / copied / 1e9:.0f} GB/s")
    for rank in options.ranks:
        factors = [(torch.randn(size, rank, device=device), torch.randn(rank, size, device=device)) for _ in weights]
        jobs = {
            how: [Merge(weight, *pair, 0.3, seed) for weight, pair in zip(weights, factors, strict=True)]
            for how, seed in (("nearest", None), ("stochastic", 1))
        }
        works: dict[str, Callable[[], object]] = {
            how: lambda merges=merges: lora_merge_group(merges)  # type: ignore[misc]
            for how, merges in jobs.items()
        }
        works["torch.addmm"] = lambda factors=factors: [  # type: ignore[misc]
            torch.addmm(weight.float(), *pair, alpha=0.3).bfloat16()
            for weight, pair in zip(weights, factors, strict=True)
        ]
        for how, work in works.items():
            took = best(work, device)
            print(f"rank {rank:>3}  {how:<11}  {took * 1e3:8.2f} ms  {took / elements * 1e9:6.3f} ns an element  "
                  f"{moved / took / 1e9:6.1f} GB/s  {copied / took:5.0%} of a copy")  # fmt: skip


if __name__ == "__main__":
    main()
