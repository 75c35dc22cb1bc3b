"""Stage 2 of LoFiT beside a plain loop over heads, on one model, data and order; fp32, on a CPU.

    python benchmarks/lofit_stage2.py [--rounds 3] [--epochs 5] [--small]

The plain loop is written from the paper (arXiv 2406.01563, eq. 3): every head of every layer is scaled and shifted in a
loop of its own, as chosen heads and others are alike there; all logits are made; the whole model runs in every step.
Ours runs the layers below the lowest chosen head once for every sequence, in the time that is measured, adds one vector
a layer, and makes logits of answer tokens only. Heads are drawn from the upper half of the layers, one of them in the
middle layer. Forms take turns; the table shows medians. All of them must learn the same offsets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LR = 1e-2
TOLERANCE = 1e-3
"""Between offsets that two forms learnt, of the longest: sums in another order let steps of Adam drift apart."""


@dataclass(frozen=True)
class Shape:
    """Sizes of model and data. The head is 27% of the layers' weights, as in SmolLM2-135M."""

    layers: int = 12
    hidden: int = 384
    heads: int = 6
    intermediate: int = 1024
    vocab: int = 14848
    sequences: int = 64
    tokens: int = 128
    answer: int = 6
    batch: int = 8
    chosen: int = 8
    epochs: int = 5


SMALL = Shape(layers=4, hidden=48, intermediate=128, vocab=512, sequences=8, tokens=32, batch=4, chosen=3, epochs=1)


@dataclass(frozen=True)
class Row:
    """One form: medians over the rounds, and the plain loop's CPU time over its own: other work disturbs that less."""

    form: str
    wall: float
    cpu: float
    ratio: float


def rows(shape: Shape, rounds: int = 3) -> list[Row]:
    """Measure every form `rounds` times, in turn."""
    scene = Scene(shape)
    samples: dict[str, list[tuple[float, float]]] = {form: [] for form in FORMS}
    learnt = {}
    for _ in range(rounds):
        for form, run in FORMS.items():
            wall, processor = time.perf_counter(), time.process_time()
            learnt[form] = run(scene)
            samples[form].append((time.perf_counter() - wall, time.process_time() - processor))
    check(learnt)
    middle = {form: tuple(map(statistics.median, zip(*each, strict=True))) for form, each in samples.items()}
    plain = middle["plain loop over heads"][1]
    return [Row(form, wall, processor, plain / processor) for form, (wall, processor) in middle.items()]


class Scene:
    """A random llama, heads to train, and data; the data is the same whatever is measured."""

    def __init__(self, shape: Shape) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from regraft.core.architectures import architecture_of
        from regraft.core.data.batches import Batches, BatchSettings
        from regraft.core.data.examples import IGNORED, Example, ints
        from regraft.core.data.rows import Place

        self.shape = shape
        torch.manual_seed(0)
        self.model: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=shape.vocab,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads,
                max_position_embeddings=2 * shape.tokens,
            )
        )
        self.model.requires_grad_(False)
        self.architecture = architecture_of(self.model.config.to_dict(), list(self.model.state_dict()))
        draw = Random(0)
        floor = shape.layers // 2
        upper = [(layer, head) for layer in range(floor, shape.layers) for head in range(shape.heads)]
        self.chosen = sorted({(floor, 0), *draw.sample(upper[1:], shape.chosen - 1)})
        prompt = shape.tokens - shape.answer
        examples = []
        for number in range(shape.sequences):
            ids = [draw.randrange(shape.vocab) for _ in range(shape.tokens)]
            labels = [IGNORED] * prompt + ids[prompt:]
            examples.append(Example(ints(ids), ints(labels), Place("random", number)))
        self.batches = Batches(examples, BatchSettings(batch_size=shape.batch, epochs=shape.epochs, drop_last=False))


def plain_loop(scene: Scene) -> dict[tuple[int, int], torch.Tensor]:
    """Hooks that visit every head, the model's own logits, AdamW, a rate that falls to 0, gradients clipped to 1."""
    import torch
    from torch.nn import functional as F

    shape, model = scene.shape, scene.model
    size = shape.hidden // shape.heads
    scales = {(layer, head): torch.zeros(size) for layer in range(shape.layers) for head in range(shape.heads)}
    offsets = {place: torch.zeros(size, requires_grad=place in scene.chosen) for place in scales}

    def hook(layer: int) -> Callable[..., Any]:
        def changed(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            outputs = args[0].clone()
            for head in range(shape.heads):
                own = slice(head * size, (head + 1) * size)
                outputs[..., own] = (1 + scales[layer, head]) * args[0][..., own] + offsets[layer, head]
            return (outputs,)

        return changed

    handles = [
        block.self_attn.o_proj.register_forward_pre_hook(hook(layer)) for layer, block in enumerate(model.model.layers)
    ]
    learning = [offsets[place] for place in scene.chosen]
    optimizer = torch.optim.AdamW(learning, lr=LR, weight_decay=0.0)
    steps = len(scene.batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step in range(steps):
        (batch,) = scene.batches.micro(step)
        logits = model(input_ids=batch.input_ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    for handle in handles:
        handle.remove()
    return {place: offsets[place].detach() for place in scene.chosen}


def ours(scene: Scene, *, cached: bool) -> dict[tuple[int, int], torch.Tensor]:
    """The plugin's adapters in core's loop."""
    from regraft.core.training.head import Head
    from regraft.core.training.last_mlp import last_mlp
    from regraft.core.training.loop import train
    from regraft.core.training.modules import layer_modules
    from regraft.core.training.objectives import CrossEntropy
    from regraft.core.training.prefix import PrefixCache
    from regraft.core.training.settings import TrainSettings
    from regraft.plugins.lofit.adapters import HeadOffsets
    from regraft.plugins.lofit.math import by_layer

    chosen = by_layer(scene.chosen)
    offsets = HeadOffsets(scene.model, scene.architecture, chosen, "head")
    head = Head.of(scene.model)
    if cached:
        layers = layer_modules(scene.model, scene.architecture)
        mlp = last_mlp(scene.model, scene.architecture)
        head = PrefixCache(head, layers, min(chosen), scene.batches, last_mlp=mlp).head
    settings = TrainSettings(lr=LR, schedule="linear", precision="float32")
    with offsets.attached():
        train(scene.model, scene.batches, settings, CrossEntropy(head), offsets.trainable)
    return offsets.vectors()


FORMS: dict[str, Callable[[Scene], dict[tuple[int, int], Any]]] = {
    "plain loop over heads": plain_loop,
    "ours, whole model": lambda scene: ours(scene, cached=False),
    "ours, prefix cached": lambda scene: ours(scene, cached=True),
}


def check(learnt: dict[str, dict[tuple[int, int], torch.Tensor]]) -> None:
    """End the benchmark unless all forms learnt the same: a figure of another work is none."""
    expected = learnt["plain loop over heads"]
    longest = max(float(vector.norm()) for vector in expected.values())
    for form, found in learnt.items():
        off = max(float((found[place] - vector).norm()) for place, vector in expected.items()) / longest
        if not off < TOLERANCE:
            raise SystemExit(f"{form} learnt other offsets: {off:.1e} of the longest apart")


def table(shape: Shape, measured: list[Row]) -> str:
    """Markdown."""
    from regraft.core.training.prefix import predicted_speed_up

    steps = -(-shape.sequences // shape.batch) * shape.epochs
    predicted = predicted_speed_up(shape.layers, shape.layers // 2)
    model = f"llama of {shape.layers} layers, hidden size {shape.hidden}, vocabulary {shape.vocab}"
    data = f"{steps} steps of {shape.batch} sequences of {shape.tokens} tokens, {shape.answer} of them learnt"
    lines = [
        f"LoFiT, stage 2: {model}; {shape.chosen} heads, the lowest in layer {shape.layers // 2};",
        f"{data}; fp32.",
        f"By the number of layers alone the prefix cache makes a step {predicted:.2f} times as fast.",
        "",
        "| form | wall s | CPU s | times as fast (CPU) |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.form} | {row.wall:.2f} | {row.cpu:.2f} | {row.ratio:.2f} |" for row in measured]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=Shape.epochs)
    parser.add_argument("--small", action="store_true", help="a smoke test: the ratio means nothing")
    options = parser.parse_args()
    shape = SMALL if options.small else Shape(epochs=options.epochs)
    print(table(shape, rows(shape, options.rounds)))


if __name__ == "__main__":
    main()
