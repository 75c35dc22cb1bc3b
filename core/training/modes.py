"""The state in which a model computes while it learns: dropout, precision, determinism; all put back afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from regraft.core.errors import Unsupported

_FAST_CPU_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Flags of /proc/cpuinfo, x86 and arm, of processors whose bf16 products are no slower than fp32."""


@contextmanager
def without_dropout(model: Any) -> Iterator[None]:
    """No dropout in modules of `model`, in whatever form: layers, and the numbers that attention takes.

    The config, and so what is saved, is not changed.
    """
    changed: list[tuple[Any, str, Any]] = []
    for module in model.modules():
        names = ["p"] if isinstance(module, torch.nn.modules.dropout._DropoutNd) else _rates(module)
        changed += [(module, name, getattr(module, name)) for name in names]
    for module, name, _ in changed:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _rates(module: Any) -> list[str]:
    values = vars(module).items()
    return [name for name, value in values if ("dropout" in name or name.endswith("pdrop")) and type(value) is float]


def resolve_precision(wish: str, device: str) -> str:
    """`float32` or `bfloat16` for the wish of the settings.

    Raises:
        Unsupported: bfloat16 is asked for where it would be many times slower.
    """
    fast = bf16_is_fast(device)
    if wish == "auto":
        return "bfloat16" if fast else "float32"
    if wish == "bfloat16" and not fast:
        raise Unsupported(
            "this device computes bfloat16 many times slower than float32",
            where="precision",
            found=device,
            remedy="use precision = \"float32\", or \"auto\"",
        )  # fmt: skip
    return wish


def bf16_is_fast(device: str) -> bool:
    """Whether `device` has bf16 arithmetic. Without it autocast took 17 to 19 times as long on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return bool(_FAST_CPU_FLAGS & set(flags))


def computing(device_type: str, precision: str) -> Any:
    """A context in which products are computed in `precision`."""
    return torch.autocast(device_type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms where there are any, and random numbers that leave the caller's alone."""
    mode = torch.get_deterministic_debug_mode()
    filling = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    devices = [device] if device.type == "cuda" else []
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = filling  # type: ignore[attr-defined]


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed for one step of one rank: a run that goes on in the middle draws what it would have drawn."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little") >> 1
