"""Trains the LoRA adapter of the quickstart recipe: `demo:tiny` learns the book of Ruth, which it has never seen.

    python -m regraft.core.demo.adapter --text kjv.txt --output recipes/quickstart-adapter

The text is that of `regraft.core.demo.train`; peft must be installed. The same text, versions, one thread and the same
type of machine give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from regraft.core.demo import TINY, corpus
from regraft.core.demo.measure import bits_per_byte, encode

BOOK = "Ruth"
RANK, ALPHA = 4, 8
STEPS, ROWS, RATE = 150, 8, 4e-3
SEED = 0


def build(text: Path, output: Path, steps: int = STEPS) -> dict[str, float]:
    """Train the adapter and write it as a PEFT folder; gives bits per byte of the book before and after.

    Sets torch's seed, thread count and deterministic algorithms for the whole process.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    verses = [verse for verse in corpus.parse_verses(text.read_text(encoding="utf-8"), text) if verse.book == BOOK]
    chapters = corpus.chapters(verses)
    model = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    before, _ = bits_per_byte(model, tokenizer, chapters)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(model, settings)
    fit(tuned, [one for chapter in chapters for one in encode(tokenizer, corpus.document(chapter))], steps)
    after, _ = bits_per_byte(tuned, tokenizer, chapters)
    write(tuned, output)
    return {"bits_per_byte_before": before, "bits_per_byte_after": after}


def fit(model: Any, ids: Sequence[int], steps: int) -> None:
    """AdamW on windows cut at random places."""
    import torch
    from torch.nn import functional as F

    window, random = model.config.max_position_embeddings, Random(SEED)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    for step in range(steps):
        starts = [random.randrange(len(ids) - window) for _ in range(ROWS)]
        rows = torch.tensor([ids[start : start + window + 1] for start in starts])
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()


def write(model: Any, output: Path) -> None:
    """The two files of a PEFT adapter, without the path of the base."""
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        settings = json.loads((Path(scratch) / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = "demo:tiny"
        settings["target_modules"] = sorted(settings["target_modules"])
        (output / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(Path(scratch) / "adapter_model.safetensors", output / "adapter_model.safetensors")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m regraft.core.demo.adapter", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--text", type=Path, required=True, help="the output of `bible -f gen1:1-rev22:21`")
    parser.add_argument("--output", type=Path, default=Path("quickstart-adapter"), help="folder to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    given = parser.parse_args()
    print(json.dumps(build(given.text, given.output, given.steps)))


if __name__ == "__main__":
    main()
