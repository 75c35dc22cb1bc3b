"""Attention entropy: how many keys the rows of attention spread over, seen where attention is computed.

H(p) = -Σ_k a(p, k)·ln a(p, k) of the query at position p, in nats; at most ln of the number of keys in sight. Means
over heads or texts are means of H, never the entropy of a mean, which is larger.

The queries, keys and masks are those that reach torch's fused attention, or the weights those that leave its softmax.
So whatever the class or code of a checkpoint does before (rotary positions, norms, scales that depend on the position,
sliding windows, soft caps) is in the figures, and no class needs to be known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from regraft.core.errors import Unsupported
from regraft.core.measures.reading import SCORES, read
from regraft.core.training.model import memory


def attention_entropy(model: Any, ids: Sequence[int], rows: Sequence[int], *, scores: int = SCORES) -> torch.Tensor:
    """The entropy of attention at some positions of a text.

    Args:
        model: a causal language model of transformers, in eval mode, with `sdpa` or `eager` attention.
        ids: [T] token ids of one text.
        rows: [R] positions, ascending.
        scores: attention scores of a layer that are held at once; see `core.measures.reading`.

    Returns:
        [layers, heads, R] in nats, fp32, on the CPU.

    Raises:
        Unsupported: attention is not computed where it can be seen.
        ResourceError: out of memory.
    """
    layers = model.config.get_text_config().num_hidden_layers
    meter = _Meter(rows, layers)
    with memory("measuring attention entropy"), meter:
        read(model, ids, scores=scores, watch=meter.begin)
        meter.end()
    return torch.cat(meter.pieces, dim=-1)


def entropy_of_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """The entropy of the weights of `scaled_dot_product_attention`, whose arguments these are.

    Args:
        query: [B, H, Q, d].
        key: [B, G, K, d]; H is a multiple of G.
        value, dropout_p, enable_gqa: without effect on the weights.
        attn_mask: to [B, H, Q, K]: what is True is seen, or numbers to add.
        is_causal: query q sees keys 0 to q.
        scale: of the logits; None takes 1 / √d.
        rows: [R] indices into Q; None takes all.

    Returns:
        [B, H, R] in nats, fp32.
    """
    del value, dropout_p, enable_gqa
    count, keys = query.shape[-2], key.shape[-2]
    rows = torch.arange(count, device=query.device) if rows is None else rows
    chosen = query[:, :, rows].float()
    groups = key.shape[1]
    grouped = chosen.reshape(chosen.shape[0], groups, -1, chosen.shape[-1])
    logits = (grouped @ key.float().transpose(-1, -2)).view(*chosen.shape[:3], keys)
    logits *= 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if is_causal:
        unseen = torch.arange(keys, device=query.device) > rows[:, None]
        logits.masked_fill_(unseen, -math.inf)
    if attn_mask is not None:
        mask = attn_mask.expand(*attn_mask.shape[:-2], count, keys)[..., rows, :]
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    return entropy_of_weights(torch.softmax(logits, dim=-1))


def entropy_of_weights(weights: torch.Tensor) -> torch.Tensor:
    """-Σ a·ln a over the last dimension, in nats, fp32; 0·ln 0 is 0."""
    entropies: torch.Tensor = torch.special.entr(weights.float()).sum(-1)
    return entropies


class _Meter(TorchFunctionMode):
    """Sees every call of torch's attention, and every softmax over attention scores, in a forward pass.

    Args:
        rows: positions in the text, ascending.
        layers: calls that a piece of the text must make.
    """

    def __init__(self, rows: Sequence[int], layers: int) -> None:
        super().__init__()
        self.rows, self.layers = list(rows), layers
        self.pieces: list[torch.Tensor] = []
        self.seen: list[torch.Tensor] | None = None
        self.start = self.stop = 0

    def begin(self, start: int, stop: int) -> None:
        """The next piece of the text begins."""
        self.end()
        self.start, self.stop, self.seen = start, stop, []

    def end(self) -> None:
        """A piece, if there was one, has been read."""
        if self.seen is None:
            return
        if len(self.seen) != self.layers:
            raise Unsupported(
                "attention is not computed where its entropy can be measured",
                where="probe: entropy",
                expected=f"{self.layers} calls of torch's attention or softmax, one for each layer",
                found=len(self.seen),
                remedy="switch this measurement off",
            )
        self.pieces.append(torch.stack(self.seen))
        self.seen = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.seen is None:
            return result
        if func is F.scaled_dot_product_attention:
            query = kwargs["query"] if kwargs and "query" in kwargs else args[0]
            self._keep(entropy_of_queries(*args, **(kwargs or {}), rows=self._own(query.device)))
        elif func is F.softmax and result.dim() == 4 and result.shape[-2] == self.stop - self.start:
            self._keep(entropy_of_weights(result[:, :, self._own(result.device)]))
        return result

    def _own(self, device: torch.device) -> torch.Tensor:
        """The rows of this piece, counted from its start."""
        own = [row - self.start for row in self.rows if self.start <= row < self.stop]
        return torch.tensor(own, dtype=torch.int64, device=device)

    def _keep(self, entropies: torch.Tensor) -> None:
        assert self.seen is not None
        self.seen.append(entropies[0].cpu())
