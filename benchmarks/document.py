"""docs/benchmarks.md: one section for each benchmark, replaced when that benchmark runs; and the machine's name."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TITLE = "# Benchmarks\n\nWritten by `nox -s bench`, section by section. Ratios hold better than seconds.\n"


def write_section(path: Path, heading: str, lines: Sequence[str]) -> None:
    """Put `lines` under `## heading`, in place of what stood there; other sections stay."""
    text = path.read_text() if path.exists() else TITLE
    section = f"## {heading}\n\n" + "\n".join(lines).strip() + "\n"
    before, _, rest = f"{text}\n".partition(f"\n## {heading}\n")
    following = re.search(r"^## ", rest, re.MULTILINE)
    after = rest[following.start() :] if following else ""
    path.write_text("\n\n".join(part.strip("\n") for part in (before, section, after) if part) + "\n")


def machine(*packages: str) -> str:
    """Processor, cores, system, and the versions of those packages that are installed."""
    versions = [f"{name} {found}" for name in packages if (found := _version(name))]
    system = f"{platform.system()} {platform.release()}"
    return f"Machine: {_processor()}, {os.cpu_count()} cores, {system}. Versions: {', '.join(versions)}."


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
