"""Names of files for reports and lock files: those of one name are told apart by the folders above them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath


def distinct_names(paths: Iterable[str]) -> dict[str, str]:
    """A name for each path: the file's own, with as many folders before it as it takes to tell it from the others.

    The folder that all files of one name share is no part of it, so that names are the same wherever the files stand.
    """
    found: dict[str, str] = {}
    groups: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for path in paths:
        absolute = os.path.abspath(path)  # noqa: PTH100 - links stay as the user named them
        groups[PurePath(absolute).name].setdefault(absolute, []).append(path)
    for group in groups.values():
        shared = os.path.commonpath([os.path.dirname(path) for path in group])  # noqa: PTH120
        tails = {path: PurePath(os.path.relpath(path, shared)).parts for path in group}
        depth = 1
        while len({tail[-depth:] for tail in tails.values()}) < len(tails):
            depth += 1
        for absolute, tail in tails.items():
            found |= dict.fromkeys(group[absolute], "/".join(tail[-depth:]))
    return found
