"""Embeddings of merged tokens: rows that the model has, rows of a table, rows that a hypernetwork predicts, means."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from regraft.plugins.tokenizer_retrofit.portable.network import Network
from regraft.plugins.tokenizer_retrofit.portable.spelling import Spelling

Source = Callable[[Mapping[bytes, tuple[int, ...]]], Mapping[bytes, torch.Tensor]]
"""Of tokens, given with the ids that spell them: rows [d] as the model stores them, for those that it has rows for."""


class Composer:
    """Embeddings of merged tokens: the row of the token that has the same bytes, or one of a source, or a mean of rows.

    Args:
        embeddings: the model's module.
        spelling: of its tokenizer.
        source: of rows for tokens that the tokenizer spells with several.
        capacity: rows that are remembered; those of the batch at hand are never dropped.
    """

    def __init__(self, embeddings: torch.nn.Module, spelling: Spelling, source: Source, capacity: int) -> None:
        self.embeddings = embeddings
        self.spelling = spelling
        self.source = source
        self.capacity = capacity
        self.cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.stamp: tuple[object, ...] = ()

    def rows(self, tokens: Iterable[bytes]) -> dict[bytes, torch.Tensor]:
        """The row [d] of each token; remembered until the embeddings change."""
        weight: Any = self.embeddings.weight
        version = None if weight.is_inference() else weight._version
        stamp = (weight.data_ptr(), weight.dtype, weight.device, version)
        if stamp != self.stamp:
            self.cache.clear()
            self.stamp = stamp
        wanted = dict.fromkeys(tokens)
        self.cache.update(self._made([data for data in wanted if data not in self.cache], weight))
        for data in wanted:
            self.cache.move_to_end(data)
        while len(self.cache) > max(self.capacity, len(wanted)):
            self.cache.popitem(last=False)
        return {data: self.cache[data] for data in wanted}

    def _made(self, tokens: list[bytes], weight: torch.Tensor) -> dict[bytes, torch.Tensor]:
        ids = {data: self.spelling.ids(data) for data in tokens}
        known = self.source({data: parts for data, parts in ids.items() if len(parts) > 1})
        scale = getattr(self.embeddings, "embed_scale", 1.0)
        made = {data: (row.to(weight.device, torch.float32) * scale).to(weight.dtype) for data, row in known.items()}
        return {data: made[data] if data in made else self._mean(parts, weight) for data, parts in ids.items()}

    def _mean(self, ids: tuple[int, ...], weight: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.embeddings(torch.tensor(ids, device=weight.device))
        return rows[0] if len(ids) == 1 else rows.float().mean(0).to(rows.dtype)


def open_source(policy: Mapping[str, Any], file: Path, model: Any) -> Source:
    """The source that the policy's composer asks for.

    Args:
        policy: of policy.json.
        file: composer.safetensors, for composers that have one.
        model: whose rows a hypernetwork reads.

    Raises:
        ValueError: the file is missing, or the network reads rows that the model lacks.
    """
    if policy["composer"] == "mean":
        return lambda spelled: {}
    if not file.is_file():
        raise ValueError(
            f"{file.name} is missing: run dynamic-tokenization again, or set composer to mean in policy.json"
        )
    tensors = load_file(file)
    if policy["composer"] == "hypernet":
        return Network(policy["hypernet"], tensors, model).rows
    data, ends = bytes(tensors["bytes"].tolist()), tensors["ends"].tolist()
    table = {data[start:end]: row for start, end, row in zip([0, *ends], ends, tensors["rows"], strict=False)}
    return lambda spelled: {token: table[token] for token in spelled if token in table}
