"""The wheel holds every file of the rooms, and nothing else; the sdist holds them too.

Usage: python tests/packaging/compare_wheel.py DIST
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

ROOMS = ("cli", "core", "kernels", "plugins", "recipes")
WHEEL_BYTES = 6_000_000
ROOT = Path(__file__).resolve().parents[2]


def on_disk() -> set[str]:
    """Files of the rooms as they are called inside the wheel."""
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and "_root" not in path.parts:
                found.add(f"regraft/{path.relative_to(ROOT).as_posix()}")
    return found | {f"regraft/{name}" for name in ("__init__.py", "__main__.py", "py.typed", "testing.py")}


def main() -> None:
    """Exit 1 with the difference, if there is one."""
    dist = Path(sys.argv[1])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        packed = {name for name in names if not name.split("/")[0].endswith((".dist-info", ".data"))}
    if not any(name.endswith(".data/data/share/man/man1/regraft.1") for name in names):
        raise SystemExit("the wheel has no manual page")
    if wheel.stat().st_size > WHEEL_BYTES:
        raise SystemExit(f"{wheel.name} has {wheel.stat().st_size} bytes: more than {WHEEL_BYTES}")
    if packed != on_disk():
        raise SystemExit(
            f"wheel and disk differ: missing {sorted(on_disk() - packed)}, extra {sorted(packed - on_disk())}"
        )
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {name.removeprefix("regraft/") for name in on_disk() if "/" in name.removeprefix("regraft/")}
    missing = sorted(name for name in expected if name not in names)
    if missing:
        raise SystemExit(f"the sdist lacks {missing}")
    print(f"{wheel.name}: {len(packed)} files, as on disk; {sdist.name}: all of them")


if __name__ == "__main__":
    main()
