"""The index over all rows: made by faiss, the same bytes every time, and measured on what the model asks of it.

faiss-cpu rather than hnswlib: it is released several times a year, with wheels for every Python where the other has a
source archive; it keeps rows in eight bits; and looking through all of its lists is exact, so exactness is a setting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Vectors = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor]]]
"""Ids [n] and rows [n, d] fp32, piece by piece; each call begins anew."""

TOP = 10
_ROUNDS, _FOR_EACH_LIST = 10, 64
"""Of k-means, and the most rows for each list that it learns from."""
_SEED_BITS = 31
_RIDGE = 0.1
"""Of the mean variance: how much every direction counts for queries, whatever was seen of it."""


def default_lists(rows: int) -> int:
    """The square root."""
    return max(1, round(math.sqrt(rows)))


def build_index(
    vectors: Vectors,
    *,
    total: int,
    width: int,
    lists: int,
    storage: str,
    seed: int,
    file: Path,
    asked: torch.Tensor | None = None,
) -> None:
    """Write the index of rows less their mean, which lowers every product with a query by the same.

    Inverted lists around the centres of k-means, in one thread. The same machine gives the same bytes; another kind of
    processor may round otherwise.

    Args:
        vectors: of all rows.
        total: how many there are.
        width: d.
        lists: of the index.
        storage: float32, float16 or int8.
        seed: of k-means and of the rows that it learns from.
        file: to write.
        asked: [n, d] vectors such as will be looked for; rows are turned by them, see `turning`.
    """
    import faiss

    with _one_thread():
        turn, back = turning(asked, width)
        mean = torch.zeros(width, dtype=torch.float64)
        for _, rows in vectors():
            mean += rows.double().sum(0)
        mean = (mean / total).float()
        centres = faiss.IndexFlatIP(width)
        kinds = {"float16": faiss.ScalarQuantizer.QT_fp16, "int8": faiss.ScalarQuantizer.QT_8bit}
        made: Any = (
            faiss.IndexIVFFlat(centres, width, lists, faiss.METRIC_INNER_PRODUCT)
            if storage == "float32"
            else faiss.IndexIVFScalarQuantizer(centres, width, lists, kinds[storage], faiss.METRIC_INNER_PRODUCT)
        )
        made.cp.seed, made.cp.niter = seed % 2**_SEED_BITS, _ROUNDS
        made.cp.min_points_per_centroid, made.cp.max_points_per_centroid = 1, _FOR_EACH_LIST
        made.train(((_sample(vectors, total, lists * _FOR_EACH_LIST, seed) - mean) @ turn).numpy())
        for ids, rows in vectors():
            made.add_with_ids(((rows - mean) @ turn).numpy(), ids.numpy())
        queries = faiss.LinearTransform(width, width, False)
        faiss.copy_array_to_vector(back.numpy().ravel(), queries.A)
        queries.is_trained = True
        # the rows are in it already, so the transform applies to what is looked for alone
        faiss.write_index(faiss.IndexPreTransform(queries, made), str(file))


def turning(asked: torch.Tensor | None, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The square root of the queries' second moment C, for rows, and its inverse, for queries; both symmetric [d, d].

    Products stay what they are, (C^-1/2 q)·(C^1/2 x) = q·x, but the queries then spread alike in all directions, and
    rows that are near each other are so in what queries tell apart. Without queries, nothing is turned.
    """
    if asked is None:
        return torch.eye(width), torch.eye(width)
    moment = asked.double().T @ asked.double() / len(asked)
    moment += _RIDGE * moment.trace() / width * torch.eye(width, dtype=torch.float64)
    values, basis = torch.linalg.eigh(moment)
    turn, back = ((basis * values**power) @ basis.T for power in (0.5, -0.5))
    return turn.float().contiguous(), back.float().contiguous()


def _sample(vectors: Vectors, total: int, count: int, seed: int) -> torch.Tensor:
    """[at most count, d] rows drawn from all."""
    drawn = torch.zeros(total, dtype=torch.bool)
    drawn[torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count]] = True
    found, start = [], 0
    for _, rows in vectors():
        found.append(rows[drawn[start : start + len(rows)]])
        start += len(rows)
    return torch.cat(found)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums depend on the number of threads."""
    import faiss

    before = faiss.omp_get_max_threads(), torch.get_num_threads()
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before[0])
        torch.set_num_threads(before[1])


def likeliest(vectors: Vectors, queries: torch.Tensor) -> torch.Tensor:
    """[queries, at most 10] ids of the rows with the largest products, computed in full.

    Args:
        vectors: of all rows.
        queries: [queries, d].
    """
    best, ids = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    for own, rows in vectors():
        products = torch.cat([best, queries @ rows.T], 1)
        both = torch.cat([ids, own.expand(len(queries), -1)], 1)
        best, places = products.topk(min(TOP, products.shape[1]), dim=1)
        ids = both.gather(1, places)
    return ids


@dataclass(frozen=True)
class Recall:
    """What a search of some lists finds.

    Args:
        probes: lists that are looked through.
        first: how often the likeliest row is among the candidates.
        top: the share of the ten likeliest that is.
    """

    probes: int
    first: float
    top: float

    def figures(self) -> Mapping[str, float]:
        """For metrics."""
        return {"probes": self.probes, "top1": round(self.first, 6), f"top{TOP}": round(self.top, 6)}


def measure(file: Path, queries: torch.Tensor, wanted: torch.Tensor, candidates: int) -> Iterator[Recall]:
    """What is found in 1, 2, 4, ... lists, and at last in all.

    Args:
        file: of the index.
        queries: [queries, d].
        wanted: ids from `likeliest`.
        candidates: that a search returns.
    """
    import faiss

    index = faiss.read_index(str(file))
    lists, probes = faiss.extract_index_ivf(index), 1
    while True:
        lists.nprobe = probes = min(probes, lists.nlist)
        found = torch.from_numpy(index.search(queries.numpy(), min(candidates, index.ntotal))[1])
        hits = (found[:, None, :] == wanted[:, :, None]).any(-1).float()
        yield Recall(probes, float(hits[:, 0].mean()), float(hits.mean()))
        if probes == lists.nlist:
            return
        probes *= 2
