"""Every parser under atheris, which prefers inputs that reach new lines; `nox -s faults` runs it.

Usage: python -m tests.fuzz.coverage_guided [TARGET ...] [--seconds N] [--findings FOLDER]

Each target runs in a process of its own, bounded in time and memory, from the seeds of `tests.fuzz.targets`. Inputs
that break a parser's contract are kept in FOLDER, one for each place that fails. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

SECONDS_EACH, MEGABYTES, SECONDS_OF_ONE = 30, 3000, 60
"""Of a target by default; of memory; that one input may take."""


def main() -> None:
    """Run the targets one after the other."""
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser()
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], metavar="TARGET")
    parser.add_argument("--seconds", type=float, default=SECONDS_EACH, help="for each target")
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir(), "regraft-findings"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz(options.targets[0], options.seconds, options.findings)
    options.findings.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in options.findings.iterdir()}
    for name in options.targets or TARGETS:
        runs = supervised(name, options.seconds, options.findings)
        print(f"{name}: {runs} inputs", flush=True)
    found = sorted({path.name for path in options.findings.iterdir()} - before)
    print(f"{len(found)} findings" + "".join(f"\n  {options.findings / name}" for name in found))
    raise SystemExit(bool(found))


def supervised(name: str, seconds: float, findings: Path) -> int:
    """Fuzz in a child process, which is started again when an input ends it; gives the number of inputs."""
    end, runs = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 1:
        command = [sys.executable, "-m", "tests.fuzz.coverage_guided", name, "--child", f"--seconds={left:.0f}",
                   f"--findings={findings}"]  # fmt: skip
        child = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        lines = child.stderr.splitlines()
        counts = [line.split()[1] for line in lines if line.startswith("Done ")]
        pulses = [line[1:].split()[0] for line in lines if line.startswith("#")]
        runs += int((counts or pulses or ["0"])[-1])
        if "NOT RUN" in child.stderr:
            sys.exit(child.stderr.strip())
        if child.returncode:
            log = findings / f"{name}-ended-{time.time_ns()}.txt"
            log.write_text("\n".join(lines[-60:]))
    return runs


def fuzz(name: str, seconds: float, findings: Path) -> None:
    """Fuzz in this process; does not return."""
    try:
        import atheris
    except ImportError:
        sys.exit("NOT RUN: atheris is not installed, or has no wheel for this platform")

    with atheris.instrument_imports(include=["regraft.core", "regraft.plugins"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS

        target = TARGETS[name]
        seeds = target.seeds()
        for seed in seeds:  # what the parser imports when it is first called is instrumented too
            target.survives(seed)
    corpus = Path(tempfile.mkdtemp(prefix="regraft-corpus-"))
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    places: set[str] = set()

    def once(data: bytes) -> None:
        try:
            target.survives(data)
        except Exception as error:
            place = place_of(error)
            if place not in places:
                places.add(place)
                keep(findings, name, place, data)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.2:
            return bytes(atheris.Mutate(data, most))
        for _ in range(chance.choice((1, 1, 2, 3))):
            data = target.mutation(data, chance.choice)
        return data[:most]

    longest = max(4096, *(4 * len(seed) for seed in seeds))
    arguments = [f"-max_total_time={max(1, int(seconds))}", f"-rss_limit_mb={MEGABYTES}", f"-timeout={SECONDS_OF_ONE}",
                 f"-max_len={longest}", "-len_control=0", f"-artifact_prefix={findings}/{name}-",
                 str(corpus)]  # fmt: skip
    atheris.Setup([sys.argv[0], *arguments], once, custom_mutator=mutate)
    atheris.Fuzz()
    os._exit(0)


def place_of(error: BaseException) -> str:
    """What was raised at first, and the last lines that it came through."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "tests/fuzz" not in frame.filename]
    return f"{type(error).__name__} {' > '.join(ours[-4:])}"


def keep(findings: Path, name: str, place: str, data: bytes) -> None:
    """Keep an input beside what it did."""
    stem = findings / f"{name}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    if not stem.with_suffix(".input").exists():
        stem.with_suffix(".input").write_bytes(data)
        stem.with_suffix(".txt").write_text(place + "\n\n" + traceback.format_exc(), errors="replace")


if __name__ == "__main__":
    main()
