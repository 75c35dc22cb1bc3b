"""A language model with a Fourier head beside the same model with the linear head it has anyway, trained alike.

    python benchmarks/fourier_head_tokens.py [short]

demo:tiny gets 64 appended bins and learns, all weights, the noisy mean of two bins from few or many sequences; the
linear head has the same appended rows, tied to the embeddings, the same batches and the same loop. Figures are of 1000
held-out sequences. `short` takes a tenth of the steps.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.load import load_data
from regraft.core.demo import TINY
from regraft.core.patch import overlay
from regraft.core.sources.folder import open_folder
from regraft.core.training.head import Head
from regraft.core.training.loop import train
from regraft.core.training.objectives import CrossEntropy
from regraft.core.training.settings import TrainSettings
from regraft.core.training.weights import select
from regraft.core.transformation import Run
from regraft.plugins.fourier_head import FourierHead

SEQUENCES = (200, 1000, 4000)
BINS, STEPS, BATCH, HELD_OUT = 64, 400, 32, 1000


def regression(count: int, seed: int, file: Path) -> torch.Tensor:
    """`count` rows of two bins and the bin of their noisy mean, as JSON lines of tokens; [count, 3] bins."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 2, generator=generator) * 1.6 - 0.8
    target = (values.mean(1) + 0.1 * torch.randn(count, generator=generator)).clamp(-0.999, 0.999)
    bins = ((torch.cat([values, target[:, None]], 1) + 1) / 2 * BINS).long()
    lines = [
        json.dumps({"prompt": f"<bin_{first}><bin_{second}>", "completion": f"<bin_{last}>"})
        for first, second, last in bins.tolist()
    ]
    file.write_text("\n".join(lines))
    return bins


def tokens(steps: int) -> str:
    """demo:tiny with appended bins, all weights trained on sums: our head, and the tied linear head it has anyway."""
    demo, step = open_folder(TINY, label="demo:tiny"), FourierHead()
    lines = ["| sequences | steps | head | held-out NLL of the bin | among bins alone |", "|---|---|---|---|---|"]
    for count in SEQUENCES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "sums.jsonl")
            bins = regression(HELD_OUT, 1, file)
            regression(count, 0, file)
            epochs = -(-steps * BATCH // count)
            learn = {"data": {"source": str(file), "end": False}, "weights": "full", "lr": 1e-3, "held_out": 0.0,
                     "batch_size": BATCH, "epochs": epochs, "steps": steps, "precision": "float32"}  # fmt: skip
            common = {"bins": BINS, "num_frequencies": 12}
            run = Run("fourier-head")
            start = overlay(demo, step.apply(demo, step.Params(**common), run), by="bins")
            patch = step.apply(demo, step.Params(**common, train=learn), run)
            ours = run.model(overlay(demo, patch, by="bins"), trust_remote_code=True)
            first = start.config["fourier_head"]["start"]
            linear = linear_model(start, step.Params(**common, train=learn), run)
            for name, model in (("fourier", ours), ("linear", linear)):
                with torch.no_grad():
                    logits = model(input_ids=bins[:, :2] + first).logits[:, -1].float()
                whole = F.cross_entropy(logits, bins[:, 2] + first).item()
                among = F.cross_entropy(logits[:, first : first + BINS], bins[:, 2]).item()
                lines.append(f"| {count} | {steps} | {name} | {whole:.4f} | {among:.4f} |")
    return "\n".join(lines)


def linear_model(start: Any, params: Any, run: Any) -> Any:
    """The stock class with the same appended rows, trained on the same batches by the same loop."""

    learn = params.train
    left_out = ("model_type", "architectures", "auto_map", "fourier_head")
    config = LlamaConfig(**{key: value for key, value in start.config.items() if key not in left_out})
    model = LlamaForCausalLM(config).float()
    state = {name: start.load(name).float() for name in start.specs if not name.startswith("lm_head")}
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    examples = list(load_data(learn.data, run.tokenizer(start), window=256).examples)
    Random(run.seed_for("train held-out")).shuffle(examples)  # as the step does before it sets some aside
    settings = BatchSettings(batch_size=learn.batch_size, epochs=learn.epochs, steps=learn.steps)
    steps = TrainSettings(lr=learn.lr, schedule=learn.schedule, clip_norm=learn.clip_norm, precision=learn.precision)
    batches = Batches(examples, settings, run.seed_for("train order"))
    train(model, batches, steps, CrossEntropy(Head.of(model)), select(model))
    return model


if __name__ == "__main__":
    print(tokens(STEPS // 10 if sys.argv[1:] == ["short"] else STEPS))
