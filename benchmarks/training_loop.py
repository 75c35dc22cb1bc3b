"""Our training loop beside `transformers.Trainer`: the same model, batches, optimiser and numbers, fp32, on a CPU.

    python benchmarks/training_loop.py [--rounds 3] [--steps 8] [--small]

Both train every weight of one random llama with AdamW at a constant rate, clipped to norm 1, on sequences of equal
length in the same order; dropout is off. Every sample is a process of its own; its first steps, which load and
allocate, are left out. Forms take turns; the table shows medians. The losses of every step must agree.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMS = ("transformers.Trainer", "regraft")
WARMUP = 2
TOLERANCE = 1e-4
LR = 1e-4


@dataclass(frozen=True)
class Shape:
    """Sizes of model and batch."""

    layers: int = 6
    hidden: int = 384
    heads: int = 6
    intermediate: int = 1024
    vocab: int = 32000
    batch: int = 8
    length: int = 256


SMALL = Shape(layers=2, hidden=64, heads=2, intermediate=128, vocab=512, batch=4, length=32)


def make_model(folder: Path, shape: Shape) -> None:
    """A random llama with tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, vocab_size=shape.vocab,
        max_position_embeddings=shape.length, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def tokens(shape: Shape, steps: int) -> list[list[int]]:
    """Sequences for every step, random."""
    from random import Random

    draw = Random(0)
    return [[draw.randrange(3, shape.vocab) for _ in range(shape.length)] for _ in range(steps * shape.batch)]


def ours(folder: Path, shape: Shape, steps: int) -> tuple[list[float], list[float], list[float]]:
    """Losses, and wall and CPU clock after every step."""
    from regraft.core.data.batches import Batches, BatchSettings
    from regraft.core.data.examples import Example, ints
    from regraft.core.data.rows import Place
    from regraft.core.sources import open_checkpoint
    from regraft.core.training.head import Head
    from regraft.core.training.loop import Records, train
    from regraft.core.training.model import materialise_model
    from regraft.core.training.objectives import CrossEntropy
    from regraft.core.training.settings import TrainSettings
    from regraft.core.training.weights import select

    model = materialise_model(open_checkpoint(str(folder)))
    examples = [
        Example(ints(ids), ints(ids), Place("random", number)) for number, ids in enumerate(tokens(shape, steps))
    ]
    batches = Batches(examples, BatchSettings(batch_size=shape.batch, shuffle=False))
    walls, processors = [time.perf_counter()], [time.process_time()]

    def listen(progress: Any) -> None:
        del progress
        walls.append(time.perf_counter())
        processors.append(time.process_time())

    settings = TrainSettings(lr=LR, precision="float32")
    report = train(
        model, batches, settings, CrossEntropy(Head.of(model)), select(model), records=Records(listen=listen)
    )
    return list(report.losses), walls, processors


def trainer(folder: Path, shape: Shape, steps: int) -> tuple[list[float], list[float], list[float]]:
    """As `ours`."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    rows = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in tokens(shape, steps)]
    losses: list[float] = []
    walls, processors = [time.perf_counter()], [time.process_time()]

    class Clock(TrainerCallback):
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            walls.append(time.perf_counter())
            processors.append(time.process_time())

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, per_device_train_batch_size=shape.batch, num_train_epochs=1, learning_rate=LR, weight_decay=0.0,
            lr_scheduler_type="constant", max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        model = LlamaForCausalLM.from_pretrained(folder)
        InOrder(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return losses, walls, processors


def sample(form: str, folder: Path, shape: Shape, steps: int) -> dict[str, Any]:
    """Median wall and CPU seconds of a step, peak RSS and losses; runs in the child."""
    losses, walls, processors = (ours if form == "regraft" else trainer)(folder, shape, steps)
    return {
        "wall": _median_step(walls),
        "cpu": _median_step(processors),
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "losses": losses,
    }


def _median_step(clock: list[float]) -> float:
    return statistics.median(after - before for before, after in zip(clock[WARMUP:], clock[WARMUP + 1 :], strict=False))


def measured(shape: Shape, rounds: int, steps: int) -> list[str]:
    """The table, in Markdown."""
    samples: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "base")
        make_model(folder, shape)
        for _ in range(rounds):
            for form in FORMS:
                samples[form].append(_in_child(form, folder, shape, steps))
    _check(samples)
    middle = {
        form: {key: statistics.median(one[key] for one in samples[form]) for key in ("wall", "cpu", "rss")}
        for form in FORMS
    }
    first = middle[FORMS[0]]
    per_step = shape.batch * shape.length
    sizes = f"{shape.layers} layers, hidden size {shape.hidden}, vocabulary {shape.vocab}"
    lines = [
        f"{sizes}, {shape.batch} x {shape.length} tokens a step, AdamW, fp32; the losses of every step agree.",
        "",
        "| loop | tokens/s | CPU s a step | peak RSS MB | speed |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {form} | {per_step / one['wall']:.0f} | {one['cpu']:.2f} | {one['rss'] / 1e6:.0f} "
        f"| {first['wall'] / one['wall']:.2f} x |"
        for form, one in middle.items()
    ]
    return lines


def _check(samples: dict[str, list[dict[str, Any]]]) -> None:
    reference = samples[FORMS[0]][0]["losses"]
    for form, runs in samples.items():
        for run in runs:
            apart = max(abs(one - other) for one, other in zip(run["losses"], reference, strict=True))
            if apart > TOLERANCE * max(reference):
                raise SystemExit(f"{form} computes other losses: {run['losses']} instead of {reference}")


def _in_child(form: str, folder: Path, shape: Shape, steps: int) -> dict[str, Any]:
    size = "small" if shape == SMALL else "full"
    command = [sys.executable, __file__, "--child", form, str(folder), size, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{form} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        form, folder, size, steps = sys.argv[2:]
        print(json.dumps(sample(form, Path(folder), SMALL if size == "small" else Shape(), int(steps))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    print("\n".join(measured(SMALL if options.small else Shape(), options.rounds, options.steps)))


if __name__ == "__main__":
    main()
