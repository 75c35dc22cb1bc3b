"""What torchrun starts: every recipe of a folder in turn, so that torch is imported once, and a record of who did what.

    torchrun ... -m tests.cli.each_recipe FOLDER

Applies FOLDER/NAME.toml to FOLDER/two/NAME, recipe by recipe, and writes FOLDER/rank-R.json: by name, the exit code,
what was printed, and the weight files that this process made. Recipes of these names meet with an accident in writing:
`full-first` and `full-second` (no space left for that process), `unlike` (the processes hold different values). In the
end all weights of FOLDER/to-train are trained, and `training peak` is the memory that this takes.
"""

import contextlib
import errno
import faulthandler
import io
import json
import os
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from regraft.cli.main import run
from regraft.core import output_file, processes, together, transfer, writer
from regraft.core.data.examples import Example, ints
from regraft.core.data.rows import Place
from regraft.core.sources.folder import open_folder
from regraft.core.training.model import materialise_model

TOKENS = 64
PATIENCE_SECONDS = 240
ACCIDENTS = {"full-first": 0, "full-second": 1, "unlike": 1}


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def apply(recipe, rank, shared):
    """Apply one recipe under keys of its own in the store; what it did."""
    made, create = [], output_file.create
    out, err = io.StringIO(), io.StringIO()

    def noting(path):
        made.append(path.name)
        return create(path)

    with ExitStack() as stack:
        patch = lambda where, name, value: stack.enter_context(mock.patch.object(where, name, value))  # noqa: E731
        processes.store.cache_clear()
        patch(
            sys.modules[rendezvous.__module__],
            "rendezvous",
            lambda url, **options: iter([(PrefixStore(recipe.stem, shared), rank, 2)]),
        )
        patch(output_file, "create", noting)
        if ACCIDENTS.get(recipe.stem) == rank:
            if recipe.stem == "unlike":
                patch(together, "fingerprint", lambda layout: "another")
            else:
                patch(writer, "write_from", full)
                patch(transfer, "write_all", full)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            run(["apply", str(recipe), "-o", str(recipe.parent / "two" / recipe.stem), "--no-durable"])
        except SystemExit as ending:
            code = ending.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "made": sorted(made)}


def training_peak(folder, rank):
    """Bytes by which a training of all weights of the checkpoint `folder` raised this process's peak."""
    from regraft.core.data.batches import Batches, BatchSettings
    from regraft.core.training.head import Head
    from regraft.core.training.loop import train
    from regraft.core.training.objectives import CrossEntropy
    from regraft.core.training.settings import TrainSettings
    from regraft.core.training.weights import select

    checkpoint = open_folder(folder, label="model")
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model = materialise_model(checkpoint)
    settings = BatchSettings(batch_size=2, epochs=2, micro_batch=1)
    batches = Batches(examples(checkpoint, 4), settings, 0, rank, 2)
    train(model, batches, TrainSettings(precision="float32"), CrossEntropy(Head.of(model)), select(model, None))
    return status("VmHWM") - before


def examples(checkpoint, count):
    draw, size = random.Random(0), checkpoint.config["vocab_size"]
    rows = [[draw.randrange(4, size) for _ in range(TOKENS)] for _ in range(count)]
    return [Example(ints(row), ints(row), Place("data.jsonl", number)) for number, row in enumerate(rows, 1)]


def status(key):
    """Bytes of memory, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main():
    """Every recipe of the folder, by name."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    faulthandler.dump_traceback_later(PATIENCE_SECONDS, exit=True)
    shared, _, _ = next(rendezvous("env://"))
    did = {recipe.stem: apply(recipe, rank, shared) for recipe in sorted(folder.glob("*.toml"))}
    processes.store.cache_clear()
    training_peak(folder / "llama", rank)  # whatever is imported and allocated once
    did["training peak"] = training_peak(folder / "to-train", rank)
    (folder / f"rank-{rank}.json").write_text(json.dumps(did))


if __name__ == "__main__":
    main()
