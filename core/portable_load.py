"""Run as a script, in a process where regraft cannot be imported: loads a checkpoint that brings code of its own.

Usage: python -I portable_load.py STOCK_LOAD FOLDER load|forward 0|1

STOCK_LOAD is the path of `regraft.core.verify.stock_load`; the last argument says whether to try without trust first.
Prints one JSON object, the last line of stdout: what `stock_load` reports, and `untrusted`, how the first try ended.
"""

import json
import runpy
import sys
import warnings
from typing import Any


class BlockRegraft:
    """A finder that stands first and knows no regraft, though it may be installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise for regraft, leave everything else to others."""
        del path, target
        if name.partition(".")[0] == "regraft":
            raise ModuleNotFoundError("regraft is not installed here", name=name)


def without_trust(folder: str) -> str:
    """The error that a load without trust ends with; empty if it succeeds."""
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    """Print the report."""
    stock_load, folder, depth, try_first = sys.argv[1:]
    sys.meta_path.insert(0, BlockRegraft())
    warnings.simplefilter("ignore")
    report: dict[str, Any] = {}
    try:
        stock = runpy.run_path(stock_load)
        if try_first == "1":
            report["untrusted"] = without_trust(folder)
        model, found = stock["load"](folder, True)
        report |= {**found, "class": type(model).__name__}
        if depth == "forward":
            report |= stock["forward"](model)
    except Exception as error:
        report["error"] = f"{type(error).__name__}: {error}"
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main()
