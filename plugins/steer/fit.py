"""Vectors from prompts: run the model, compare the activations of both sets at every place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.architectures import Architecture
from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import TransformationError
from regraft.core.training.activations import Activations, Kind, Probe, Site
from regraft.core.training.model import window_of
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.transformation import Run
from regraft.plugins.steer.math import accuracy, cosine_gap, difference, entropy_weights, normalised
from regraft.plugins.steer.params import SteerParams
from regraft.plugins.steer.places import Place, residual_refusal
from regraft.plugins.steer.prompts import PromptSet, answer_ids, read_prompts

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Measured:
    """The vector of one place, and how it came out.

    Args:
        vector: [size] in fp32, before `strength`.
        difference: norm of the difference of means, before it is normalised.
        activation_norm: mean norm of the activations.
        accuracy: see `math.accuracy`; None where there is nothing to compare.
        cosine: see `math.cosine_gap`; likewise.
    """

    vector: torch.Tensor
    difference: float
    activation_norm: float
    accuracy: float | None
    cosine: float | None

    @property
    def norm(self) -> float:
        """Of the vector."""
        return float(self.vector.double().norm())


@dataclass(frozen=True)
class Measurement:
    """Everything that a run measured.

    Args:
        places: by place, those chosen and those not.
        chosen: that get their vector, in the order of their names.
        positive, negative: the prompts.
        entropies: of the positive prompts, if they weigh.
    """

    places: Mapping[Place, Measured]
    chosen: Sequence[Place]
    positive: PromptSet
    negative: PromptSet | None
    entropies: torch.Tensor | None


def measure(
    checkpoint: Checkpoint, architecture: Architecture, params: SteerParams, places: Sequence[Place], run: Run
) -> Measurement:
    """Vectors for `places`.

    Raises:
        InputError, UsageError, Unsupported, ResourceError: as model and prompts are read, and the model runs.
        TransformationError: the two sets of prompts do not differ anywhere.
    """
    refuse_untrusted_code(checkpoint, trust=run.trust)
    tokenizer, model = run.tokenizer(checkpoint), run.model(checkpoint, dtype=params.dtype)
    window = window_of(checkpoint, model)
    assert params.positive is not None
    answers = None if params.answers is None else answer_ids(tokenizer, params.answers)
    positive = read_prompts(params.positive, tokenizer, key="positive", window=window, seed=run.seed_for("positive"))
    negative = None
    if params.negative is not None:
        negative = read_prompts(
            params.negative, tokenizer, key="negative", window=window, seed=run.seed_for("negative")
        )
    if params.site == "residual":
        _try_residual(model, architecture, places, positive.ids[0][:_PROBE_TOKENS])
    sites = sorted({_site(place) for place in places})
    entropy = params.weighting == "entropy"
    ours = _probe(model, architecture, params, run, "positive", positive).take(
        sites, positive.ids, entropy=entropy, answers=answers
    )
    theirs = None
    if negative is not None:
        theirs = _probe(model, architecture, params, run, "negative", negative).take(sites, negative.ids)
    weights = None if ours.entropies is None else entropy_weights(ours.entropies)
    found = {place: _compared(place, architecture, ours, theirs, weights, params) for place in places}
    if not any(one.norm for one in found.values()):
        raise TransformationError(
            "the activations of the prompts do not differ, so there is no vector",
            where=places[0].name + (f" and {len(places) - 1} more" if len(places) > 1 else ""),
            remedy="give two sets that differ at their last tokens, or position = \"mean\"",
        )  # fmt: skip
    return Measurement(found, _chosen(found, params), positive, negative, ours.entropies)


def _probe(
    model: Any, architecture: Architecture, params: SteerParams, run: Run, name: str, prompts: PromptSet
) -> Probe:
    total = len(prompts.ids)
    return Probe(
        model,
        architecture,
        params.batch_size,
        params.position,
        lambda done: run.tell(f"activations of {name} prompts: {done}/{total}"),
    )


def _try_residual(model: Any, architecture: Architecture, places: Sequence[Place], ids: Sequence[int]) -> None:
    probe = Probe(model, architecture)
    for place in places:
        if not probe.mlp_adds_to_residual(place.layer, ids):
            raise residual_refusal(architecture, place.layer, "another change of the residual stream, when tried")


def _site(place: Place) -> Site:
    kind: Kind = "head" if place.site in ("head", "kv-group") else place.site  # type: ignore[assignment]
    return Site(place.layer, kind)


def _values(place: Place, architecture: Architecture, taken: Activations) -> torch.Tensor:
    """Activations [N, size]; of a key-value group the mean over its query heads, all of which its vector moves."""
    values = taken.values[_site(place)]
    if place.head is None:
        return values
    if place.site == "head":
        return values[:, place.head]
    own = [head for head in range(architecture.num_heads) if architecture.kv_head_of(head) == place.head]
    return values[:, own].double().mean(1)


def _compared(
    place: Place,
    architecture: Architecture,
    ours: Activations,
    theirs: Activations | None,
    weights: torch.Tensor | None,
    params: SteerParams,
) -> Measured:
    positive = _values(place, architecture, ours)
    negative = None if theirs is None else _values(place, architecture, theirs)
    everything = positive if negative is None else torch.cat([positive, negative])
    raw = difference(positive, negative, weights)
    return Measured(
        normalised(raw, everything, params.normalise).float(),
        float(raw.norm()),
        float(everything.double().norm(dim=1).mean()),
        None if negative is None else accuracy(positive, negative),
        None if negative is None else cosine_gap(positive, negative, raw),
    )


def _chosen(found: Mapping[Place, Measured], params: SteerParams) -> list[Place]:
    """All places, or as many heads as were asked for: by accuracy, then by cosine, then by layer and head."""
    if not isinstance(params.heads, int):
        return list(found)
    return sorted(ranked(found)[: params.heads], key=lambda place: place.name)


def ranked(found: Mapping[Place, Measured]) -> list[Place]:
    """Places, those that tell the prompts apart best first."""

    def rank(place: Place) -> tuple[float, float, int, int]:
        one = found[place]
        return -(one.accuracy or 0.0), -(one.cosine or 0.0), place.layer, place.head or 0

    return sorted(found, key=rank)
