"""Known vulnerabilities of everything that is installed beside this script; `nox -s audit` runs it.

Usage: python tests/packaging/audit.py

Asks the advisory service of pip-audit about every distribution by its public version. First it asks about one that is
known to be vulnerable: a service that does not know that cannot be trusted to know of others, and an audit that has
asked nobody must not pass. Exit code 0: nothing is known; 1: something is; 3: nothing was audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

CANARY = "jinja2==2.4.1"
"""Has had advisories since 2014."""
OURS = "regraft"
ACCEPTED: dict[str, str] = {}
"""Advisories that do not concern us, with the reason."""


def main() -> None:
    """Audit, and end with the exit code."""
    found, trouble = audit([CANARY])
    if not any(package.get("vulns") for package in found):
        print(f"NOT AUDITED: the advisory service does not answer, or knows nothing of {CANARY}", file=sys.stderr)
        print(trouble.strip().splitlines()[-1:], file=sys.stderr)
        raise SystemExit(3)
    found, trouble = audit(installed())
    if not found:
        raise SystemExit(f"the audit failed: {trouble}")
    skipped = [package for package in found if "skip_reason" in package]
    for package in skipped:
        print(f"not audited: {package['name']}: {package['skip_reason']}")
    known = [(package, one) for package in found for one in package.get("vulns", ()) if one["id"] not in ACCEPTED]
    for package, one in known:
        fixed = ", ".join(one.get("fix_versions", ())) or "no release"
        print(f"{package['name']} {package['version']}: {one['id']}, fixed by {fixed}")
    print(f"{len(found)} packages, {len(skipped)} not audited, {len(known)} known vulnerabilities")
    raise SystemExit(bool(known or skipped))


def installed() -> list[str]:
    """Every distribution but our own, pinned to its version without what a builder has added."""
    pins = {canonicalize_name(one.metadata["Name"]): Version(one.version).public for one in distributions()}
    return sorted(f"{name}=={version}" for name, version in pins.items() if name != OURS)


def audit(requirements: list[str]) -> tuple[list[dict[str, object]], str]:
    """What pip-audit says of each requirement, nothing if it failed; and what it wrote to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "requirements.txt")
        file.write_text("\n".join(requirements))
        command = [sys.executable, "-m", "pip_audit", "-r", str(file), "--no-deps", "--disable-pip", "-f", "json",
                   "--progress-spinner", "off", "--timeout", "30"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)["dependencies"], done.stderr
    except (ValueError, KeyError):
        return [], done.stderr


if __name__ == "__main__":
    main()
