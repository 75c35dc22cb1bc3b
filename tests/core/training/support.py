"""Tiny models, tokens and one call of the loop, for the tests of the training machinery."""

from __future__ import annotations

import random

from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.examples import IGNORED, Example, PreferenceExample, ints
from regraft.core.data.rows import Place
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.head import Head
from regraft.core.training.loop import Records, train
from regraft.core.training.model import materialise_model
from regraft.core.training.objectives import CrossEntropy
from regraft.core.training.settings import TrainSettings
from regraft.core.training.weights import select


def model_of(folder, **options):
    return materialise_model(open_checkpoint(folder), **options)


def sequence(length, seed=0, prompt=0, number=None):
    """Random tokens of the tiny vocabulary, the first `prompt` of them not learnt."""
    draw = random.Random(f"{seed}/{length}")
    ids = [draw.randrange(4, 128) for _ in range(length)]
    labels = [IGNORED] * prompt + ids[prompt:]
    return Example(ints(ids), ints(labels), Place("data.jsonl", seed if number is None else number))


def sequences(count, length=12, **options):
    return [sequence(length, seed, **options) for seed in range(1, count + 1)]


def pairs(count, length=10):
    return [PreferenceExample(sequence(length, seed, 4), sequence(length + 3, seed + 100, 4)) for seed in range(count)]


def batches(examples, *, seed=0, **settings):
    return Batches(examples, BatchSettings(**settings), seed)


def fit(model, data, *, names=None, objective=None, penalty=None, records=None, trainable=None, **settings):
    """Train all parameters, or those named."""
    settings = TrainSettings(**{"lr": 1e-3, "precision": "float32", **settings})
    objective = objective or CrossEntropy(Head.of(model))
    chosen = trainable or select(model, names)
    return train(model, data, settings, objective, chosen, penalty=penalty, records=records or Records())


def values(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
