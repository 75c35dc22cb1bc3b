"""FOCUS rows without downloads: new tokens as sparse mixtures of the kept ones that stand in like company.

Dobler and de Melo (arXiv 2305.14481), section 3: in an auxiliary space of static token vectors, a new token's
similarities to the tokens that both vocabularies share become weights by sparsemax, and its row is the weighted sum of
their rows.
Their auxiliary space is fastText's; ours is made from counts of neighbours, positive pointwise mutual information
reduced by a truncated singular value decomposition, which needs no other library and comes out the same every time.
Tokens that the corpus never shows keep the mean of their pieces, where FOCUS draws them at random.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from regraft.plugins.tokenizer_retrofit.vocabulary import Origin

if TYPE_CHECKING:
    import numpy
    import torch

Mixture = dict[int, tuple[list[int], list[float]]]
"""By new token: old ids and their weights, which sum to one."""

WINDOW, DIMENSIONS = 5, 100
_AT_ONCE = 512
_MERGE_EVERY = 1 << 22
_TOKENS = 1_000_000


def focus(origins: Sequence[Origin], texts: Iterable[Sequence[int]], *, seed: int, tokens: int = _TOKENS) -> Mixture:
    """Mixtures for the new tokens that the corpus shows.

    Args:
        origins: of the new rows.
        texts: the corpus, as ids of the new vocabulary.
        seed: of the decomposition.
        tokens: of the corpus that are counted.
    """
    space = auxiliary_space(_first(texts, tokens), len(origins), seed=seed)
    return mixtures(space, origins)


def auxiliary_space(
    texts: Iterable[Sequence[int]], rows: int, *, seed: int, dimensions: int = DIMENSIONS
) -> torch.Tensor:
    """[rows, dimensions] a vector of unit length for each token; zeros for tokens that do not occur.

    Entry (a, b) of the matrix that is decomposed is max(0, log(n_ab n / (n_a n_b))) with n_ab the number of times that
    b stands at most five tokens from a.

    Args:
        texts: ids.
        rows: of the vocabulary.
        seed: of the randomised decomposition.
        dimensions: of the vectors, at most the number of tokens that occur.
    """
    import torch

    keys, counts = _neighbours(texts, rows)
    pairs = torch.from_numpy(keys)
    number = torch.from_numpy(counts).double()
    left, right = pairs // rows, pairs % rows
    margin = torch.zeros(rows, dtype=torch.float64).index_add_(0, left, number)
    information = (number * number.sum() / (margin[left] * margin[right])).log()
    positive = information > 0
    used = margin.nonzero().flatten()
    place = torch.full((rows,), -1)
    place[used] = torch.arange(len(used))
    indices = torch.stack([place[left[positive]], place[right[positive]]])
    matrix = torch.sparse_coo_tensor(indices, information[positive], (len(used), len(used)), check_invariants=False)
    space = torch.zeros(rows, dimensions, dtype=torch.float64)
    size = min(dimensions, len(used))
    if size:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vectors, values, _ = torch.svd_lowrank(matrix, q=size, niter=4)
        space[used, :size] = vectors * values.sqrt()
    return torch.nn.functional.normalize(space).float()


def mixtures(space: torch.Tensor, origins: Sequence[Origin]) -> Mixture:
    """Sparsemax of the cosines between each new token and the kept ones, for tokens that have a vector.

    Args:
        space: [rows, dimensions] of unit or zero length.
        origins: of the rows.
    """
    present = space.abs().sum(1) > 0
    kept = [index for index, origin in enumerate(origins) if origin.kept is not None and present[index]]
    new = [index for index, origin in enumerate(origins) if origin.kept is None and present[index]]
    found: Mixture = {}
    for start in range(0, len(new) if kept else 0, _AT_ONCE):
        piece = new[start : start + _AT_ONCE]
        shares = sparsemax(space[piece] @ space[kept].T)
        for row, share in zip(piece, shares, strict=True):
            chosen = share.nonzero().flatten().tolist()
            old = [origins[kept[place]].kept for place in chosen]
            found[row] = ([index for index in old if index is not None], share[chosen].tolist())
    return found


def sparsemax(scores: torch.Tensor) -> torch.Tensor:
    """[..., n] the point of the simplex nearest to the scores, mostly zeros (Martins, Astudillo, 1602.02068, eq. 3).

    max(z - tau, 0) with tau = (Σ_{j<=k} z_(j) - 1) / k and k the largest for which 1 + k z_(k) > Σ_{j<=k} z_(j).
    """
    import torch

    ordered = scores.sort(-1, descending=True).values
    sums = ordered.cumsum(-1)
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    support = (1 + count * ordered > sums).sum(-1, keepdim=True)
    tau = (sums.gather(-1, support - 1) - 1) / support
    return (scores - tau).clamp(min=0)


def _first(texts: Iterable[Sequence[int]], tokens: int) -> Iterable[Sequence[int]]:
    left = tokens
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def _neighbours(texts: Iterable[Sequence[int]], rows: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Pairs as `left · rows + right`, and how often each occurs."""
    import numpy as np

    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[numpy.ndarray] = []
    for text in texts:
        ids = np.asarray(text, np.int64)
        for distance in range(1, min(WINDOW + 1, len(ids))):
            one, other = ids[:-distance], ids[distance:]
            waiting += [one * rows + other, other * rows + one]
        if sum(map(len, waiting)) > _MERGE_EVERY:
            keys, counts = _counted(keys, counts, waiting)
            waiting = []
    return _counted(keys, counts, waiting)


def _counted(
    keys: numpy.ndarray, counts: numpy.ndarray, more: list[numpy.ndarray]
) -> tuple[numpy.ndarray, numpy.ndarray]:
    import numpy as np

    one = np.ones(sum(map(len, more)), np.int64)
    whole, weight = np.concatenate([keys, *more]), np.concatenate([counts, one])
    found, place = np.unique(whole, return_inverse=True)
    return found, np.bincount(place, weights=weight, minlength=len(found)).astype(np.int64)
