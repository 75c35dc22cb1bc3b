"""Directions between two sets of activations, and how well they tell the sets apart.

Letters: N positive and M negative prompts, D numbers an activation. Everything is computed in float64.
"""

from __future__ import annotations

import torch

from regraft.plugins.steer.params import Normalise


def entropy_weights(entropies: torch.Tensor) -> torch.Tensor:
    """w_i = H_i / Σ H (EAST, arXiv 2406.00244), [N] in float64; equal weights where every entropy is zero.

    Args:
        entropies: [N], not negative.
    """
    entropies = entropies.double()
    total = entropies.sum()
    return entropies / total if total > 0 else torch.full_like(entropies, 1 / len(entropies))


def difference(
    positive: torch.Tensor, negative: torch.Tensor | None, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Σ w_i z_i - mean z', [D] in float64.

    Args:
        positive: z, [N, D].
        negative: z', [M, D]; without it z' is z.
        weights: w, [N], which sum to one; without them all are 1 / N.
    """
    positive = positive.double()
    mean = positive.mean(0)
    weighted = mean if weights is None else weights.double() @ positive
    return weighted - (mean if negative is None else negative.double().mean(0))


def normalised(vector: torch.Tensor, activations: torch.Tensor, how: Normalise) -> torch.Tensor:
    """`vector` [D] at the length that `how` says; a zero vector stays zero.

    - `none`: as it is;
    - `unit`: 1;
    - `activation-norm`: the mean norm of the activations;
    - `deviation`: the standard deviation of the activations along the vector (ITI's σ, arXiv 2306.03341, section 3.2).

    Args:
        vector: in float64.
        activations: [N + M, D].
        how: see above.
    """
    norm = float(vector.norm())
    if how == "none" or norm == 0:
        return vector
    unit: torch.Tensor = vector / norm
    length = 1.0
    if how == "activation-norm":
        length = float(activations.double().norm(dim=1).mean())
    elif how == "deviation":
        length = float((activations.double() @ unit).std(correction=0))
    return unit * length


def accuracy(positive: torch.Tensor, negative: torch.Tensor) -> float | None:
    """Share of activations on the right side of the plane between the means of all the others.

    For each activation the two means are taken without it; it is right if it is nearer to its own, which is the sign of
    its product with their difference. None for a set of one, which has no others. A draw counts half.

    Args:
        positive: [N, D].
        negative: [M, D].
    """
    if min(len(positive), len(negative)) < 2:
        return None
    right = [
        _right(own.double(), other.double().mean(0)) for own, other in ((positive, negative), (negative, positive))
    ]
    return float(torch.cat(right).mean())


def _right(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """1, 0, or 0.5 for each of `own` [N, D], the other set's mean being `other` [D]."""
    means = (own.sum(0) - own) / (len(own) - 1)
    side = ((own - (means + other) / 2) * (means - other)).sum(1)
    return (side.sign() + 1) / 2


def cosine_gap(positive: torch.Tensor, negative: torch.Tensor, vector: torch.Tensor) -> float:
    """Half the gap between the mean cosines of both sets with `vector`, seen from the point between their means.

    1 where every positive activation lies in the direction of the vector and every negative one opposite; 0 where
    nothing tells them apart.

    Args:
        positive: [N, D].
        negative: [M, D].
        vector: [D].
    """
    positive, negative, vector = positive.double(), negative.double(), vector.double()
    middle = (positive.mean(0) + negative.mean(0)) / 2
    cosines = [torch.nn.functional.cosine_similarity(own - middle, vector[None]).mean() for own in (positive, negative)]
    return float(cosines[0] - cosines[1]) / 2
