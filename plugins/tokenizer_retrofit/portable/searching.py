"""A head over very many rows that computes the logits of a few: those that an index finds, and those always computed.

Dynamic Tokenization (Feher, Vulić, Minixhofer, arXiv 2411.18553) searches rows by their cosine. A logit is an inner
product, so the index holds the rows as long as they are, less their mean, which moves all logits alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

_AT_ONCE = 1 << 14


class Rows:
    """The rows of the model's own table, and behind them those that were appended.

    Args:
        own: [V, d] of the model; read anew each time, so that it may change.
        more: [N, d] appended; as they are stored, and in the model's precision where they are taken.
    """

    def __init__(self, own: torch.Tensor, more: torch.Tensor) -> None:
        self.own = own
        self.more = more.to(own.device)

    def take(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., d] the rows of these ids."""
        first = len(self.own)
        rows = self.own[ids.clamp(max=first - 1)]
        if len(self.more):
            appended = ids >= first
            rows[appended] = self.more[ids[appended] - first].to(rows.dtype)
        return rows


class Index:
    """Finds rows by their inner product with a vector.

    Args:
        file: as faiss wrote it.
        probes: lists that are looked through; as many as there are finds the best rows by their codes for certain.

    Raises:
        ValueError: faiss is not installed, or the file is missing.
    """

    def __init__(self, file: Path, probes: int) -> None:
        try:
            import faiss
        except ImportError:
            raise ValueError("searching needs faiss: pip install faiss-cpu, or search exactly") from None
        if not file.is_file():
            raise ValueError(f"{file.name} is missing: run large-vocabulary again, or search exactly")
        self.index: Any = faiss.read_index(str(file))
        lists = faiss.extract_index_ivf(self.index)
        lists.nprobe = min(probes, lists.nlist)

    def find(self, vectors: torch.Tensor, count: int) -> torch.Tensor:
        """[n, count] ids of rows for each of the vectors [n, d], -1 where there are no more."""
        found = self.index.search(vectors.float().cpu().numpy(), min(count, self.index.ntotal))
        return torch.from_numpy(found[1]).to(vectors.device)


class CandidateHead(nn.Module):
    """Stands in the place of a model's head and gives the logits of candidates alone.

    Args:
        rows: of the head.
        bias: of the head, for all rows; None without.
        always: [m] ids that are candidates of every place.
        index: of all rows but those that are never written; None computes every row of `known`.
        known: [n] the ids in the index.
        count: candidates that the index finds.
    """

    def __init__(
        self, rows: Rows, bias: torch.Tensor | None, always: torch.Tensor, index: Index | None, known: torch.Tensor,
        count: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rows, self.bias, self.always, self.index, self.known = rows, bias, always, index, known
        self.count = count
        self.ids = torch.empty(0)
        self.doubled = torch.empty(0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[batch, 1, candidates] logits for the last of the states [batch, length, d]; their ids are in `ids`."""
        last = states[:, -1]
        if self.index is None:
            self.ids = self.known.expand(len(last), -1)
            self.doubled = torch.zeros_like(self.ids, dtype=torch.bool)
            return self._all(last)[:, None]
        queries = last if self.bias is None else torch.cat([last, torch.ones_like(last[:, :1])], 1)
        found = self.index.find(queries, self.count)
        always = self.always.expand(len(last), -1)
        self.doubled = torch.cat(
            [torch.zeros_like(always, dtype=torch.bool), torch.isin(found, self.always) | (found < 0)], 1
        )
        self.ids = torch.cat([always, found.clamp(min=0)], 1)
        logits = torch.einsum("bd,bkd->bk", last, self.rows.take(self.ids))
        return (logits if self.bias is None else logits + self.bias[self.ids])[:, None]

    def _all(self, last: torch.Tensor) -> torch.Tensor:
        parts = torch.split(self.rows.more, _AT_ONCE) if len(self.rows.more) else ()
        logits = torch.cat([last @ self.rows.own.T, *(last @ part.to(last.dtype).T for part in parts)], 1)
        return (logits if self.bias is None else logits + self.bias)[:, self.known]

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """[batch, candidates] the logits that the model made of them, fp32, without candidates that stand twice."""
        return logits[:, -1].float().masked_fill(self.doubled, -torch.inf)


def head_bias(model: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The biases of the head for own and appended rows; None without."""
    own = getattr(model.get_output_embeddings(), "bias", None)
    if own is None:
        return None
    more = tensors.get("bias", own[:0])
    return torch.cat([own.detach(), more.to(own.device, own.dtype)])
