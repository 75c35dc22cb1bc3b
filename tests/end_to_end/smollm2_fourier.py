"""A Fourier head on a real model: 256 bins appended to SmolLM2-135M-Instruct, read without regraft, and trained.

Usage: python tests/end_to_end/smollm2_fourier.py [short] [--keep DIR] [--steps 80] [--lr 3e-4]

A toy regression in words: "The mean of 37 and 62 is" and the bin of a noisy mean. All weights learn, once with the
Fourier head and once with the linear head that the model has anyway, its rows appended alike, tied; the same sequences
in the same batches on the same loop. Figures are of held-out prompts. `short` does few steps of each and claims nothing
of them, and reads the checkpoint in a process that cannot import regraft instead of an environment without it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from smollm2 import environment_without_regraft, fetch, regraft, shell
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from regraft.core.checkpoint import Checkpoint
from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.load import load_data
from regraft.core.data.settings import DataSettings
from regraft.core.patch import overlay
from regraft.core.sources.folder import open_folder
from regraft.core.training.head import Head
from regraft.core.training.loop import train
from regraft.core.training.objectives import CrossEntropy
from regraft.core.training.settings import TrainSettings
from regraft.core.training.weights import select
from regraft.core.transformation import Run
from regraft.plugins.fourier_head import FourierHead

BINS, RANGE, NOISE, FREQUENCIES, BATCH, SEED = 256, (0, 100), 3.0, 12, 16, 0


def prompts(count: int, seed: int) -> list[tuple[str, int]]:
    """Prompts, and the bins of their answers."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        one, other = draw.randrange(10, 91), draw.randrange(10, 91)
        answer = min(max((one + other) / 2 + draw.gauss(0, NOISE), 0), 99.9)
        found.append((f"The mean of {one} and {other} is", int(answer / 100 * BINS)))
    return found


def write(path: Path, rows: list[tuple[str, int]]) -> Path:
    """As JSON lines of prompt and completion."""
    path.write_text("".join(json.dumps({"prompt": text, "completion": f"<bin_{bin_}>"}) + "\n" for text, bin_ in rows))
    return path


def recipe(root: Path, name: str, base: Path, step: str) -> dict[str, Any]:
    """Write and apply a recipe; the metrics of its step."""
    path = root / f"{name}.toml"
    path.write_text(f'seed = {SEED}\n[base]\nmodel = "{base}"\n{step}\n[output]\ndtype = "float32"\nverify = "load"\n')
    started = time.monotonic()
    regraft("apply", path, "-o", root / name, "--force", "--no-durable")
    print(f"{name}: applied in {time.monotonic() - started:.0f} s", flush=True)
    steps = json.loads((root / name / "regraft.lock.json").read_text())["steps"]
    return steps[0]["metrics"] if steps else {}


def step_of(train_table: str = "") -> str:
    """The step, with or without training."""
    return (
        f'[[steps]]\nuse = "fourier-head"\nbins = {BINS}\nrange = {list(RANGE)}\n'
        f"num_frequencies = {FREQUENCIES}\n{train_table}"
    )


def measured(model: Any, tokenizer: Any, rows: list[tuple[str, int]], start: int) -> dict[str, float]:
    """Held-out negative log-likelihood of the bin, in nats: among all tokens, and among the bins alone."""
    whole, among = 0.0, 0.0
    with torch.inference_mode():
        for begin in range(0, len(rows), BATCH):
            texts, answers = zip(*rows[begin : begin + BATCH], strict=True)
            ids = tokenizer(list(texts), return_tensors="pt").input_ids  # numbers of two digits: all equally long
            logits, wanted = model(ids).logits[:, -1].float(), torch.tensor(answers)
            whole += F.cross_entropy(logits, start + wanted, reduction="sum").item()
            among += F.cross_entropy(logits[:, start : start + BINS], wanted, reduction="sum").item()
    return {"nll": round(whole / len(rows), 4), "nll among bins": round(among / len(rows), 4)}


def linear_model(staged: Checkpoint, data: Path, lr: float, steps: int) -> Any:
    """The stock class with the same appended rows, trained on the same batches by the same loop."""
    left_out = ("model_type", "architectures", "auto_map", "fourier_head")
    config = LlamaConfig(**{key: value for key, value in staged.config.items() if key not in left_out})
    model = LlamaForCausalLM(config).float()
    state = {name: staged.load(name).float() for name in staged.specs if not name.startswith("lm_head")}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    run = Run("fourier-head", seed=SEED)
    settings = DataSettings(source=str(data), end=False)
    examples = list(load_data(settings, run.tokenizer(staged), window=256).examples)
    random.Random(run.seed_for("train held-out")).shuffle(examples)  # as the step does before it sets some aside
    batches = Batches(examples, BatchSettings(batch_size=BATCH, steps=steps), run.seed_for("train order"))
    options = TrainSettings(lr=lr, schedule="linear", clip_norm=1.0, precision="float32")
    train(model, batches, options, CrossEntropy(Head.of(model)), select(model))
    return model


def run(root: Path, *, short: bool, steps: int, lr: float) -> None:
    """The campaign in `root`."""
    gguf = fetch(root)
    recipe(root, "base", gguf, "")
    metrics = recipe(root, "untrained", root / "base", step_of())
    print(f"  {json.dumps({key: metrics[key] for key in ('bins', 'start', 'head_parameters_after')})}")
    python = sys.executable if short else environment_without_regraft(root / "plain")
    reload = Path(__file__).with_name("reload_fourier.py")
    print(shell(python, "-I", reload, root / "base", root / "untrained").strip(), flush=True)
    train_both(root, short=short, steps=steps, lr=lr)


def train_both(root: Path, *, short: bool, steps: int, lr: float) -> None:
    """Fourier head and linear head on the same prompts."""
    steps, count, held = (2, 32, 16) if short else (steps, steps * BATCH, 512)
    data, held_out = write(root / "means.jsonl", prompts(count, seed=1)), prompts(held, seed=2)
    table = (
        f'[steps.train]\ndata = {{ source = "{data}", end = false }}\nweights = "full"\nlr = {lr}\nheld_out = 0.0\n'
        f'batch_size = {BATCH}\nsteps = {steps}\nprecision = "float32"\n'
    )
    recipe(root, "trained", root / "base", step_of(table))
    after = Run("fourier-head")
    trained = open_folder(root / "trained", label="trained")
    tokenizer, start = after.tokenizer(trained), trained.config["fourier_head"]["start"]
    found = {"fourier": measured(after.model(trained, trust_remote_code=True), tokenizer, held_out, start)}
    base = open_folder(root / "base", label="base")
    step = FourierHead()
    given = step.Params(bins=BINS, range=RANGE, num_frequencies=FREQUENCIES)
    staged = overlay(base, step.apply(base, given, Run("fourier-head", seed=SEED)), by="bins")
    found["linear"] = measured(linear_model(staged, data, lr, steps), tokenizer, held_out, start)
    noise = NOISE / 100 * BINS
    best = 0.5 * torch.log(torch.tensor(2 * torch.pi * torch.e * noise**2)).item()
    print(f"{steps} steps of {BATCH} new sequences, lr {lr:g}; the noise alone is {best:.3f} nats")
    for head, figures in found.items():
        print(f"  {head}: {json.dumps(figures)}")
    if not short:
        assert all(figures["nll among bins"] < math.log(BINS) for figures in found.values()), "better than even odds"


def main() -> None:
    """Run the campaign; every statement it prints was checked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", nargs="?", choices=["short", "full"], default="full")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        run(root, short=options.size == "short", steps=options.steps, lr=options.lr)


if __name__ == "__main__":
    main()
