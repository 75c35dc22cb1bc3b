"""Messages as they are, one text file each: REGRAFT_UPDATE_SNAPSHOTS=1 writes them, otherwise they are compared."""

import os
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "snapshots"


def check_snapshot(name, text, folder):
    """Compare `text` with the snapshot `name`; `folder` is the test's own, which differs from run to run."""
    found = normal(text, folder)
    path = FOLDER / f"{name}.txt"
    if os.environ.get("REGRAFT_UPDATE_SNAPSHOTS") == "1":
        path.write_text(found)
    assert path.is_file(), f"no snapshot {path.name}: run with REGRAFT_UPDATE_SNAPSHOTS=1 and look at it"
    assert found == path.read_text(), f"{path.name} differs; if it is better now: REGRAFT_UPDATE_SNAPSHOTS=1"


def normal(text, folder):
    """`text` without the test's folder, and without what grows: the lists of plugins and of shipped recipes."""
    for path in {str(folder), str(Path(folder).resolve())}:
        text = text.replace(path, "<FOLDER>")
    return re.sub(r"(installed|shipped recipes): [a-z0-9, -]+", r"\1: <NAMES>", text)
