"""What stands behind a chunk: the correction of approximate likelihood matching for where tokens end.

A vocabulary says by a token's end what may come next: a model that writes `the` in one token would have gone on with
another had the word been `then`, one that writes `th` would not. So the likelihood of a chunk counts together with that
of an end behind it, Σ p over tokens that begin with a space, a tab or a newline and over special tokens, and chunks
behind which the old model expects none are joined with the next (Minixhofer et al., arXiv 2503.20083, section 3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from regraft.core.errors import InputError
from regraft.kernels.linear_cross_entropy import linear_cross_entropy
from regraft.plugins.tokenizer_retrofit.alignment import NO_CHUNK, Aligned, Side
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

if TYPE_CHECKING:
    from regraft.core.training.head import Head

_BEGINNINGS = (b" ", b"\t", b"\n")


def space_tokens(file: TokenizerFile) -> list[int]:
    """Ids of the tokens that end what stands before them, whatever it is.

    Raises:
        InputError: there are none.
    """
    special = {token.id for token in file.added if token.special}
    found = [
        index for index, token in file.tokens.items()
        if index in special or (file.bytes_of(token) or b"").startswith(_BEGINNINGS)
    ]  # fmt: skip
    if not found:
        raise InputError("no token begins with a space, and none is special", where=file.label,
                         remedy="set append_space = false and join_below = 0")  # fmt: skip
    return found


def space_log_probs(head: Head, states: torch.Tensor, spaces: torch.Tensor) -> torch.Tensor:
    """log Σ p over `spaces` behind each state, [C] fp32: the difference of two losses of the same label, the one among
    all tokens and the other among `spaces`.

    Args:
        head: of the model; it is fused.
        states: [C, hidden_size], that enter the head.
        spaces: [S] int64, ids.
    """
    weight, bias = head.module.weight, getattr(head.module, "bias", None)
    first = spaces[:1].expand(len(states))

    def losses(weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(states, weight, labels, bias=bias, reduction="none", softcap=head.softcap)

    among = losses(weight[spaces], None if bias is None else bias[spaces], torch.zeros_like(first))
    return (among - losses(weight, bias, first)).float().clamp(max=0)


def label_and_space_log_probs(
    head: Head, input_ids: torch.Tensor, ends: torch.Tensor, spaces: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the next tokens, [B, T], 0 at the last one, and of a space behind some, [C]; both fp32.

    Args:
        head: of the model.
        input_ids: [B, T].
        ends: [C] int64, places among the B · T tokens.
        spaces: [S] int64, ids.
    """
    labels = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], NO_CHUNK)], dim=1).flatten()
    if head.fused:
        states = head.hidden(input_ids).flatten(0, 1)
        losses = linear_cross_entropy(
            states, head.module.weight, labels, bias=getattr(head.module, "bias", None), ignore_index=NO_CHUNK,
            reduction="none", softcap=head.softcap,
        )  # fmt: skip
        return -losses.float().view_as(input_ids), space_log_probs(head, states[ends], spaces)
    logits = head.model(input_ids=input_ids, use_cache=False).logits.float().flatten(0, 1)
    losses = F.cross_entropy(logits, labels, ignore_index=NO_CHUNK, reduction="none")
    behind = logits[ends].log_softmax(-1)[:, spaces].logsumexp(-1).clamp(max=0)
    return -losses.view_as(input_ids), behind


def joined(text: Aligned, likely: torch.Tensor, behind: torch.Tensor, below: float) -> tuple[Aligned, torch.Tensor]:
    """The text with chunks joined until a space behind one is likelier than `below`; what is left is one too.

    Args:
        text: as it was aligned.
        likely: [C] log-likelihoods by the old model; NaN where a chunk has none, and so belongs to no chunk now.
        behind: [C] log-probabilities, by the old model, of a space behind each.
        below: a probability; 0 joins none.

    Returns:
        The text, and [C] int64: the new chunk of each old one, `NO_CHUNK` for none.
    """
    there = ~likely.isnan()
    ends = there & ((behind.exp() > below) | (below == 0))
    new = torch.where(there, ends.long().cumsum(0) - ends.long(), NO_CHUNK)
    number = new.tolist()

    def moved(side: Side) -> Side:
        return Side(side.example, [chunk if chunk == NO_CHUNK else number[chunk] for chunk in side.chunks])

    return Aligned(moved(text.old), moved(text.new), max(number) + 1), new
