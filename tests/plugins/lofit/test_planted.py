"""Oracles 8 and 9: heads that were changed in a teacher are found by distilling it, and offsets are learnt from it."""

import random
from types import SimpleNamespace

import pytest
import torch

from regraft.core.architectures import architecture_of
from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.training.loop import train
from regraft.core.training.settings import TrainSettings
from regraft.plugins.lofit.adapters import HeadOffsets, HeadScales
from regraft.plugins.lofit.math import best, by_layer
from tests.core.training.support import sequences
from tests.families import tiny

LAYERS, HEADS = 4, 8


class Distil:
    """KL of a fixed teacher to the model, summed over tokens and divided by their number in a sequence."""

    def __init__(self, model, examples, teacher):
        self.model, self.tokens = model, torch.tensor([list(one.ids) for one in examples])
        with torch.no_grad(), teacher.attached():
            self.wanted = self.log_probs(self.tokens)

    def log_probs(self, tokens):
        return self.model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)

    def divergence(self, tokens, indices):
        wanted = self.wanted[indices]
        return (wanted.exp() * (wanted - self.log_probs(tokens))).sum(-1).mean(-1)

    def __call__(self, batch):
        return self.divergence(batch.input_ids, list(batch.indices)).sum(), {}

    def now(self):
        with torch.no_grad():
            return self.divergence(self.tokens, slice(None)).mean().item()

    def identity(self):
        return {"name": "distil"}


class Sequences(Batches):
    """Batches whose unit is a sequence."""

    def units(self, step):
        return len(self.indices(step))


@pytest.fixture
def scene():
    model = tiny("llama", num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS)
    architecture = architecture_of(model.config.to_dict(), list(model.state_dict()))
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    planted = sorted(random.Random(0).sample(every, 4))
    examples = sequences(32, 24)

    def fit(adapters, objective, steps, lr, l1=None):
        batches = Sequences(examples, BatchSettings(batch_size=8, epochs=steps, steps=steps))
        settings = TrainSettings(lr=lr, schedule="linear", precision="float32")
        with adapters.attached():
            return train(model, batches, settings, objective, adapters.trainable,
                         penalty=None if l1 is None else adapters.penalty(l1))  # fmt: skip

    return SimpleNamespace(model=model, architecture=architecture, planted=planted, examples=examples, fit=fit)


def plant(scene, kind):
    """A teacher with random scales, or offsets, in the planted heads alone."""
    if kind == "offsets":
        teacher = HeadOffsets(scene.model, scene.architecture, by_layer(scene.planted), "head")
        values = {layer: list(range(len(units))) for layer, units in teacher.chosen.items()}
    else:
        teacher = HeadScales(scene.model, scene.architecture, range(LAYERS), "head", std=0.0)
        values = by_layer(scene.planted)
    for layer, rows in values.items():
        generator = torch.Generator().manual_seed(layer)
        for row in rows:
            teacher.parameters[layer].data[row] = torch.randn(8, generator=generator)
    return teacher


def scores_of(scene, kind):
    """Stage 1 as the plugin runs it: rate 5e-3, λ 5e-4."""
    objective = Distil(scene.model, scene.examples, plant(scene, kind))
    scales = HeadScales(scene.model, scene.architecture, range(LAYERS), "head", seed=3)
    report = scene.fit(scales, objective, 150, 5e-3, 5e-4)
    assert report.losses[-1] < report.losses[0]
    return {
        (layer, head): norm
        for layer, rows in scales.parameters.items()
        for head, norm in enumerate(rows.detach().norm(dim=1).tolist())
    }


def test_planted_scales_are_found(scene):
    """4 of 4, and clearly: the weakest of them scores far above the best of the others."""
    scores = scores_of(scene, "scales")
    found = best(scores, 5)
    assert sorted(found[:4]) == scene.planted
    assert scores[found[3]] > 1.5 * scores[found[4]]


@pytest.mark.slow
def test_planted_offsets_are_not_seen_by_scales(scene):
    """What the page on LoFiT says: a scale cannot do what an offset does, so such heads do not stand out."""
    scores = scores_of(scene, "offsets")
    assert sorted(best(scores, 4)) != scene.planted


def test_offsets_are_learnt_from_a_teacher(scene):
    """The divergence goes, though other offsets may do what the planted ones did."""
    objective = Distil(scene.model, scene.examples, plant(scene, "offsets"))
    before = objective.now()
    offsets = HeadOffsets(scene.model, scene.architecture, by_layer(scene.planted), "head")
    scene.fit(offsets, objective, 150, 3e-2)
    with offsets.attached():
        after = objective.now()
    assert before > 0.05
    assert after < 0.02 * before
