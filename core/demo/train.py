"""Trains `demo:tiny` from the King James Bible of the Debian packages bible-kjv and bible-kjv-text.

The text is in the public domain: the packages' copyright file says that its copyright is expired, the translation
dating from 1611. To rebuild the checkpoint (about twenty-five minutes of one core):

    apt-get install bible-kjv bible-kjv-text
    bible -f gen1:1-rev22:21 < /dev/null > kjv.txt
    python -m regraft.core.demo.train --text kjv.txt --output core/demo/tiny

The same text, versions of torch, tokenizers and Python, one thread and the same type of machine give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from regraft.core.demo import corpus
from regraft.core.demo.measure import Figures, encode, measure
from regraft.core.errors import InputError, RegraftError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 256
VOCABULARY = 2048
STEPS = 3000
LEAST_CHARACTERS = 10_000
ROWS, EXERCISE_ROWS = 16, 4
"""Rows of a batch, and how many of them are exercises in the last half of the training."""

DRILL_ROWS, DRILL_CONTEXT = 64, 64
"""The same for the drill that comes before it: exercises only, and short ones.

Heads that copy form there within some hundred steps, once the embeddings mean something. With long exercises mixed into
the text from the first step they had not formed after 3000.
"""

PEAK_RATE, WARMUP_STEPS, WEIGHT_DECAY, CLIP_NORM = 5e-3, 100, 0.1, 1.0
SEED = 0

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# demo:tiny

A llama of one million parameters, the demonstration checkpoint of regraft. It writes in the manner of the King James
Bible, and recalls who was called what in its 256-token context, in a text or in a chat. It knows nothing else.

Trained by `python -m regraft.core.demo.train` on the text of the Debian package bible-kjv-text, which is in the public
domain (1611), without the books of Ruth, Ecclesiastes, Jonah and James, and on exercises built from that text.
The weights, the tokenizer and this card are licensed under Apache-2.0.
"""


def train_tokenizer(texts: Sequence[str], size: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `size` tokens, with all 256 bytes among them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(corpus.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = (corpus.BEGIN, tokenizer.token_to_id(corpus.BEGIN))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BEGIN} $A", pair=f"{corpus.BEGIN} $A {corpus.BEGIN}:1 $B:1", special_tokens=[begin]
    )
    return tokenizer


def make_model(vocabulary: int) -> Any:
    """A stock `LlamaForCausalLM` with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def text_rows(ids: Sequence[int], random: Random) -> Iterator[list[int]]:
    """Endless rows of `CONTEXT + 1` ids that begin a document: each epoch cuts the text at another place."""
    while True:
        starts = list(range(random.randrange(CONTEXT), len(ids) - CONTEXT + 1, CONTEXT))
        random.shuffle(starts)
        for start in starts:
            yield [0, *ids[start : start + CONTEXT]]


def exercise_rows(
    tokenizer: Tokenizer, exercises: corpus.Exercises, random: Random, context: int = CONTEXT
) -> Iterator[list[int]]:
    """Endless rows of `context + 1` ids: whole exercises one after the other, the last cut off."""
    while True:
        row: list[int] = []
        while len(row) <= context:
            row += encode(tokenizer, exercises.draw(random))
        yield row[: context + 1]


def batches(tokenizer: Tokenizer, verses: Sequence[corpus.Verse], steps: int) -> Iterator[list[list[int]]]:
    """The rows of each step: two fifths of the steps text, a tenth drill, and half of them text with exercises."""
    ids = [one for chapter in corpus.chapters(verses) for one in encode(tokenizer, corpus.document(chapter))]
    texts, names = [verse.text for verse in verses], corpus.names_in(verses)
    windows = text_rows(ids, Random(SEED))
    short = corpus.Exercises(texts, names, most_words=10, room=60)
    drill = exercise_rows(tokenizer, short, Random(SEED + 1), DRILL_CONTEXT)
    exercises = exercise_rows(tokenizer, corpus.Exercises(texts, names), Random(SEED + 2))
    for step in range(steps):
        if step < 0.4 * steps:
            yield list(islice(windows, ROWS))
        elif step < 0.5 * steps:
            yield list(islice(drill, DRILL_ROWS))
        else:
            yield [*islice(windows, ROWS - EXERCISE_ROWS), *islice(exercises, EXERCISE_ROWS)]


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine to a twentieth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return PEAK_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def fit(model: Any, batches: Iterator[list[list[int]]], steps: int) -> None:
    """AdamW on the cross-entropy of every token, in fp32; a line on stderr each hundred steps."""
    import torch
    from torch.nn import functional as F

    decayed = [p for p in model.parameters() if p.dim() > 1]
    kept = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": kept, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)
    started = time.perf_counter()
    for step, rows in enumerate(batches):
        ids = torch.tensor(rows)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            spent = time.perf_counter() - started
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {spent:.0f} s", file=sys.stderr, flush=True)


def write(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    """Writes the checkpoint as bfloat16, with plain 0644 files; `model` is left in bfloat16."""
    import torch
    from transformers import GenerationConfig

    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": corpus.BEGIN,
        "eos_token": corpus.END,
        "pad_token": corpus.PAD,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(corpus.CHAT_TEMPLATE)
    (folder / "README.md").write_text(CARD)
    for file in folder.iterdir():
        file.chmod(0o644)


def build(text: Path, output: Path, steps: int = STEPS, threads: int = 1) -> Figures:
    """Trains tokenizer and model on the verses of `text` and writes the checkpoint to `output`.

    Sets torch's seed, thread count and deterministic algorithms for the whole process.

    Raises:
        InputError: the file cannot be read, is not such a text, or is too short.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers import LlamaForCausalLM

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    try:
        verses = corpus.parse_verses(text.read_text(encoding="utf-8"), text)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "cannot read the text", where=text, found=error, remedy="give a readable UTF-8 file"
        ) from error
    known, held_out = corpus.split(verses)
    names = corpus.names_in(known)
    size = sum(len(verse.text) for verse in known)
    if len(names) < 8 or size < LEAST_CHARACTERS or not held_out:
        raise InputError(
            "the text is too short to train on",
            where=text,
            expected=f"8 names, {LEAST_CHARACTERS} characters, and one of the books {', '.join(corpus.HELD_OUT_BOOKS)}",
            found=f"{len(names)} names, {size} characters, {len(held_out)} verses of those books",
            remedy="give the whole Bible",
        )
    tokenizer = train_tokenizer([verse.text for verse in known])
    model = make_model(tokenizer.get_vocab_size())
    fit(model, batches(tokenizer, known, steps), steps)
    write(output, model, tokenizer)

    written = LlamaForCausalLM.from_pretrained(output, dtype=torch.float32)
    fresh = corpus.Exercises([verse.text for verse in held_out], names)
    return measure(written, tokenizer, corpus.chapters(held_out), fresh)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m regraft.core.demo.train", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--text", type=Path, required=True, help="the output of `bible -f gen1:1-rev22:21`")
    parser.add_argument("--output", type=Path, default=Path("demo-tiny"), help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="more than one may change the bytes (default: 1)")
    given = parser.parse_args(arguments)
    if given.steps < 1 or given.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    try:
        figures = build(given.text, given.output, given.steps, given.threads)
    except RegraftError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(vars(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
