"""A language model that reads hand-written digits without a visual token.

Usage: python tests/end_to_end/vlora_toy.py [short] [--keep DIR] [--seed N]

Pictures of scikit-learn's digits are looked at by a tiny CLIP vision tower with random weights, which stays as it is.
`vlora-train` trains a generator for demo:tiny, frozen too, on two questions about each picture. Then `vlora` bakes
pictures that it has never seen into checkpoints, which answer the same text prompts in stock transformers. `short`
trains less and asks less of it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from smollm2 import regraft, shell

DIGIT, PARITY = "Which digit is it?", "Is it even or odd?"
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE, HELD_OUT, BATCH = 32, 297, 32
ASK = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, questions = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert not any(name.partition(".")[0] == "regraft" for name in sys.modules)
answers = []
for question in questions:
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
print(json.dumps(answers))
"""


def answer(question: str, digit: int) -> str:
    """What is to be said of a picture."""
    return f"It is {NAMES[digit]}." if question == DIGIT else f"It is {'odd' if digit % 2 else 'even'}."


def draw(folder: Path, seed: int) -> tuple[list[int], list[int]]:
    """A picture of each of scikit-learn's digits; what they show, those to learn from first, and the held-out ones."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = list(range(len(digits.images)))
    random.Random(seed).shuffle(order)
    folder.mkdir()
    for number, index in enumerate(order):
        pixels = np.uint8(255 - digits.images[index] * 255 / 16)
        Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
    shown = [int(digits.target[index]) for index in order]
    return shown[:-HELD_OUT], shown[-HELD_OUT:]


def make_tower(folder: Path, seed: int) -> None:
    """A CLIP vision tower that has learnt nothing, with its image processor."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)  # fmt: skip


def write_rows(path: Path, digits: list[int]) -> None:
    """Both questions about every picture, as chats."""
    lines = []
    for number, digit in enumerate(digits):
        for question in (DIGIT, PARITY):
            said = [("user", question), ("assistant", answer(question, digit))]
            messages = [{"role": role, "content": content} for role, content in said]
            lines.append(json.dumps({"image": f"{number}.png", "messages": messages}))
    path.write_text("\n".join(lines) + "\n")


def train(root: Path, steps: int, seed: int) -> Path:
    """Train a generator; its folder."""
    (root / "train.toml").write_text(f"""
seed = {seed}
[base]
model = "demo:tiny"
[[steps]]
use = "vlora-train"
data = "images/rows.jsonl"
vision = "tower"
new = {{ dim = 64, depth = 2, heads = 4, rank = 8, types = "qkvom", every = 1, separate = false }}
lr = 2e-3
batch_size = {BATCH}
micro_batch = {BATCH}
epochs = 100
steps = {steps}
""")
    started = time.monotonic()
    regraft("apply", root / "train.toml", "-o", root / "trained", "--force", "--no-durable")
    regraft("verify", root / "trained")
    (step,) = json.loads((root / "trained" / "regraft.lock.json").read_text())["steps"]
    figures = step["metrics"]
    print(f"{figures['steps']} steps, {figures['learnt_numbers']} numbers: loss {figures['first_loss']:.3f} -> "
          f"{figures['final_loss']:.3f} in {time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    return root / "trained" / "vlora"


class Reader:
    """demo:tiny with deltas attached, for many pictures at once.

    Args:
        generator: its folder.
        tower: of the vision encoder.
    """

    def __init__(self, generator: Path, tower: Path) -> None:
        from regraft.core.architectures import architecture_of
        from regraft.core.sources.open import open_checkpoint
        from regraft.core.training.model import materialise_model, materialise_tokenizer
        from regraft.plugins.vlora.folder import open_generator
        from regraft.plugins.vlora.train_attach import Attached
        from regraft.plugins.vlora.vision import open_tower

        base, found = open_checkpoint("demo:tiny"), open_generator(generator)
        self.generator, self.encoder = found.load(), open_tower(str(tower)).load()
        self.model, self.tokenizer = materialise_model(base), materialise_tokenizer(base)
        keys = [(kind, layer) for kind in found.settings.types for layer in found.settings.active_layers]
        architecture = architecture_of(base.config, base.specs)
        self.attached = Attached(self.model, architecture, keys, found.settings.scale)

    def likeliest(self, pictures: list[Path], question: str) -> list[str]:
        """Of each picture the likeliest of all answers, whole; no pictures: one answer, of the base."""
        answers = list(dict.fromkeys(answer(question, digit) for digit in range(10)))
        return [answers[number] for number in self.log_probabilities(pictures, question, answers).argmax(1).tolist()]

    @torch.no_grad()
    def log_probabilities(self, pictures: list[Path], question: str, answers: list[str]) -> torch.Tensor:
        """[pictures, answers], of whole answers with the token that ends them; no pictures: one row, of the base."""
        from regraft.core.data.batches import collate
        from regraft.core.data.encode import Encoder
        from regraft.core.data.records import Chat
        from regraft.core.data.rows import Place

        encoder, place = Encoder(self.tokenizer), Place("questions", 1)
        columns = []
        with self.attached.attached():
            factors: Any = {}
            if pictures:
                factors = self.generator(torch.stack([self.encoder(picture) for picture in pictures]))
            for text in answers:
                said = Chat(({"role": "user", "content": question}, {"role": "assistant", "content": text}))
                count = len(pictures) or 1
                batch = collate([encoder.encode(said, place)] * count, tuple(range(count)))
                if pictures:
                    self.attached.see(factors, torch.arange(count))
                logits = self.model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1].log_softmax(-1)
                labels = batch.labels[:, 1:]
                chosen = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
                columns.append((chosen * (labels >= 0)).sum(1))
        return torch.stack(columns, 1)


def accuracy(reader: Reader, root: Path, held_out: list[int], first: int) -> dict[str, tuple[float, float]]:
    """By question, the share of held-out pictures with the right answer: of the base, and with the picture's deltas.

    The likeliest of all answers counts, whole, with the token that ends it: for the base, which cannot see, that is
    always the same one.
    """
    pictures = [root / "images" / f"{first + number}.png" for number in range(len(held_out))]
    found = {}
    for question in (DIGIT, PARITY):
        wanted = [answer(question, digit) for digit in held_out]
        blind, seeing = reader.likeliest([], question) * len(wanted), reader.likeliest(pictures, question)
        shares = [fmean(one == right for one, right in zip(said, wanted, strict=True)) for said in (blind, seeing)]
        found[question] = (shares[0], shares[1])
        print(f"{question:20} base {shares[0]:.1%}, seeing {shares[1]:.1%} of {len(held_out)} held-out pictures")
    return found


def bake(root: Path, reader: Reader, generator: Path, held_out: list[int], first: int, count: int) -> None:
    """Merged checkpoints of pictures of different digits answer in stock transformers, in an isolated process.

    They say what the model with deltas attached finds likeliest, but for what rounding to bfloat16 may turn.
    """
    chosen = [held_out.index(digit) for digit in range(count)]
    right = same = 0
    for number in chosen:
        picture, target = root / "images" / f"{first + number}.png", root / f"baked-{number}"
        (root / "bake.toml").write_text(f"""
[base]
model = "demo:tiny"
[[steps]]
use = "vlora"
output = "merged"
image = {json.dumps(str(picture))}
generator = {json.dumps(str(generator))}
vision = {json.dumps(str(root / "tower"))}
[output]
verify = "load"
""")
        regraft("apply", root / "bake.toml", "-o", target, "--force", "--no-durable")
        said = json.loads(shell(sys.executable, "-I", "-c", ASK, target, json.dumps([DIGIT, PARITY])))
        right += said == [answer(question, held_out[number]) for question in (DIGIT, PARITY)]
        same += said == [reader.likeliest([picture], question)[0] for question in (DIGIT, PARITY)]
        print(f"  {picture.name} shows {NAMES[held_out[number]]}; its checkpoint says: {' '.join(said)}", flush=True)
    assert right >= 0.5 * count, f"{right} of {count} right"
    assert same >= count - 1, f"{same} of {count} as the model with deltas attached"


def main() -> None:
    """Run the campaign; every statement it prints was checked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("size", nargs="?", choices=["short", "full"], default="full")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    short = options.size == "short"
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        learnt, held_out = draw(root / "images", options.seed)
        write_rows(root / "images" / "rows.jsonl", learnt)
        make_tower(root / "tower", options.seed)
        generator = train(root, 200 if short else 600, options.seed)
        reader = Reader(generator, root / "tower")
        found = accuracy(reader, root, held_out, len(learnt))
        for question, chance in ((DIGIT, 0.1), (PARITY, 0.5)):
            assert abs(found[question][0] - chance) < 0.06, found
        assert found[DIGIT][1] >= (0.7 if short else 0.9), found
        bake(root, reader, generator, held_out, len(learnt), 2 if short else 10)


if __name__ == "__main__":
    main()
