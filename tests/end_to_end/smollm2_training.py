"""Hyperfitting, LoFiT and a chain of three steps on a real model.

Usage: python tests/end_to_end/smollm2_training.py [short] [--keep DIR] [--truthfulqa DIR]

SmolLM2-135M-Instruct is hyperfitted on 8 x 48 tokens, and learns by LoFiT to prefer true answers: those of TruthfulQA
if its folder (train.csv, val.csv) is given, else of arithmetic made up here. `short` does few steps of each, and looks
only at what few steps can show.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import fmean

from smollm2 import ROOT, fetch, regraft

STORY = ROOT / "recipes" / "hyperfit-story.txt"
PROMPTS = [
    "The ship left the harbour at dawn, and the captain",
    "When the old woman opened the door, she saw",
    "Nobody in the village had ever heard of a",
    "The letter began with the words",
    "On the third day of the storm, the children",
    "He had not spoken to his brother since",
    "In the garden behind the house there was",
    "The train was late, and on the platform",
]
HEADS, FLOOR = 4, 15


def apply(root: Path, name: str, *steps: str, base: Path, seed: int = 0) -> list[dict[str, object]]:
    """Write and apply a recipe; what the lock file says of its steps."""
    recipe = root / f"{name}.toml"
    text = "\n".join(f"[[steps]]\n{step}" for step in steps)
    recipe.write_text(f'seed = {seed}\n[base]\nmodel = "{base}"\n{text}\n[output]\nverify = "load"\n')
    started = time.monotonic()
    regraft("apply", recipe, "-o", root / name, "--force", "--no-durable")
    regraft("verify", root / name)
    print(f"{name}: applied and verified in {time.monotonic() - started:.0f} s", flush=True)
    lock = json.loads((root / name / "regraft.lock.json").read_text())
    return [step["metrics"] for step in lock["steps"]]


def hyperfitting(epochs: int, *, short: bool) -> str:
    """The step; the paper's recipe at a size and a rate for a CPU."""
    new_tokens, window = (24, 24) if short else (128, 96)
    return f"""use = "hyperfitting"
data = {json.dumps(str(STORY))}
samples = 8
seq_len = 48
held_out = 4
epochs = {epochs}
lr = 5e-5
stop_loss = 0.1
[steps.report]
prompts = {json.dumps(PROMPTS)}
new_tokens = {new_tokens}
ttr_window = {window}
"""


def check_hyperfitting(root: Path, base: Path, *, short: bool) -> None:
    """The paper's findings: training loss near zero, more different words, less entropy, worse held-out loss."""
    (metrics,) = apply(root, "hyperfitted", hyperfitting(2 if short else 40, short=short), base=base)
    before, after = metrics["before"], metrics["after"]
    print(f"  training loss: {metrics['first_loss']:.3f} -> {metrics['final_loss']:.3f} in {metrics['steps']} steps")
    print(f"  before: {json.dumps(before)}\n  after:  {json.dumps(after)}")
    assert metrics["final_loss"] < metrics["first_loss"], metrics
    if short:
        return
    assert metrics["final_loss"] < 0.15, metrics["final_loss"]
    assert after["type_token_ratio"] > before["type_token_ratio"], (before, after)
    assert after["held_out"]["entropy"] <= 0.8 * before["held_out"]["entropy"], (before, after)
    assert after["held_out"]["loss"] >= before["held_out"]["loss"] + 0.5, (before, after)


def lofit(data: Path, held_out: Path, *, scoring: str, epochs: int) -> str:
    """The step; heads from the middle of the model on."""
    return f"""use = "lofit"
task = "dpo"
data = {json.dumps(str(data))}
held_out = {json.dumps(str(held_out))}
heads = {HEADS}
layers = "{FLOOR}-"
scoring = "{scoring}"
tune = {{ epochs = {epochs} }}
""" + (f"select = {{ epochs = {epochs} }}\n" if scoring == "scale" else "")


def check_lofit(root: Path, base: Path, truthfulqa: Path | None, *, short: bool) -> None:
    """Offsets on few chosen heads beat the base on held-out pairs, and random heads by the mean of three draws."""
    data, held_out = root / "pairs.jsonl", root / "held_out.jsonl"
    count = 16 if short else 96
    write_pairs(data, truthfulqa_pairs(truthfulqa / "train.csv") if truthfulqa else sums(256, seed=0), count)
    write_pairs(held_out, truthfulqa_pairs(truthfulqa / "val.csv") if truthfulqa else sums(64, seed=1), count // 2)
    losses: dict[str, list[float]] = {"scale": [], "random": []}
    for scoring, seed in [("scale", 0), *(("random", seed) for seed in range(1 if short else 3))]:
        step = lofit(data, held_out, scoring=scoring, epochs=1 if short else 5)
        (metrics,) = apply(root, f"lofit-{scoring}-{seed}", step, base=base, seed=seed)
        figures = metrics["held_out"]
        losses[scoring].append(figures["after"]["loss"])
        print(f"  {HEADS} heads, {scoring}, seed {seed}: {json.dumps(figures)}", flush=True)
        assert figures["after"]["loss"] < figures["before"]["loss"], figures
    if not short:
        assert losses["scale"][0] < fmean(losses["random"]), losses


def check_chain(root: Path, base: Path) -> None:
    """Three steps, two of which learn, in one apply: one checkpoint is read and one is written."""
    write_pairs(root / "chain.jsonl", sums(32, seed=2), 16)
    extension = 'use = "context-extension"\nmethod = "abf"\ntarget_length = 16384\n'  # the class keeps its biases
    steps = [
        extension,
        lofit(root / "chain.jsonl", root / "chain.jsonl", scoring="random", epochs=1),
        hyperfitting(1, short=True),
    ]
    applied = apply(root, "chain", *steps, base=base)
    assert len(applied) == 3
    weights = list((root / "chain").glob("*.safetensors"))
    assert len(weights) == 1, weights
    assert not list(root.glob(".chain.regraft")), "the work folder is left"


def truthfulqa_pairs(path: Path) -> list[dict[str, str]]:
    """The best answer against the first incorrect one, as in the paper."""
    with path.open(newline="") as file:
        return [
            {
                "prompt": f"Q: {row['Question']} A:",
                "chosen": f" {row['Best Answer']}",
                "rejected": f" {row['Incorrect Answers'].split(';')[0].strip()}",
            }
            for row in csv.DictReader(file)
        ]


def sums(count: int, seed: int) -> list[dict[str, str]]:
    """Sums of two numbers: the right one in words before figures, against one that is off."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        one, other, off = draw.randrange(2, 50), draw.randrange(2, 50), draw.choice([-3, -2, 2, 3])
        pairs.append(
            {
                "prompt": f"Q: What is {one} plus {other}? A:",
                "chosen": f" {one} plus {other} is {one + other}.",
                "rejected": f" {one} plus {other} is {one + other + off}, I think.",
            }
        )
    return pairs


def write_pairs(path: Path, pairs: list[dict[str, str]], count: int) -> None:
    """The first `count` of them."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:count]))


def main() -> None:
    """Run the campaign; every statement it prints was checked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", nargs="?", choices=["short", "full"], default="full")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    parser.add_argument("--truthfulqa", type=Path, help="folder with train.csv and val.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        gguf, short = fetch(root), options.size == "short"
        check_lofit(root, gguf, options.truthfulqa, short=short)
        check_hyperfitting(root, gguf, short=short)
        check_chain(root, gguf)


if __name__ == "__main__":
    main()
