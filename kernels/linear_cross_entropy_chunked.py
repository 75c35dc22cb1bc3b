"""Cross-entropy of a linear head in torch: the logits of one chunk of tokens at a time, their gradients on the spot.

    z = f(s·(H Wᵀ + b)),  f(x) = c·tanh(x / c) or x          logits [N, V], never whole
    m = max z,  n = Σ exp(z - m),  loss = log n + m - z[label]      one of each for every token
    E = (exp(z - m) - n·onehot(label)) · f'                  n times the gradient of the loss
    r = s·u / n,  dH = r·(E W),  dW = Eᵀ (r·H),  db = Eᵀ r          u the gradient of what is made of the losses

m and n apart are as exact as fp32 is; log n + m would round the logarithm of a probability to the size of the logits.
Factors of tokens go to the side of the hidden states, where there are fewer numbers than logits.
Products are written into `out=` or in place, which is what autocast leaves alone.

The vocabulary is cut too: a low-precision weight is widened block by block, never whole. Where the losses are summed,
u is the same for all tokens, so that `forward` computes the gradients for u = 1 while it has the logits (the idea of
Liger-Kernel, arXiv 2410.10989); otherwise `backward` computes the logits of a chunk again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

WEIGHT_BLOCK_ELEMENTS = 1 << 20
"""Elements of the weight used at a time, 4 MB in fp32; a quarter or four times of it is up to 10% slower."""

CHUNK_TOKENS = 256
"""Tokens at a time: their logits are smaller than an fp32 weight of hidden size 256. At 2048 tokens, hidden size 512,
vocabulary 32000, forward and backward, one core: 64 tokens 2.1 s, 128 1.6 s, 256 1.46 s, 512 1.45 s (plain 1.8 s)."""


class Gradients(NamedTuple):
    """Of hidden states [N, D], weight [V, D] and bias [V]; None where not wanted."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


class Wanted(NamedTuple):
    """Which gradients are computed."""

    hidden: bool
    weight: bool
    bias: bool


class Softmax(NamedTuple):
    """The largest logit of every token, m of the formula, and the sum n of exp(z - m): [N] each."""

    peak: torch.Tensor
    total: torch.Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """Tokens that have a label, and the head that reads them: hidden [N, D], weight [V, D], bias [V], labels [N]."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    softcap: float | None
    scale: float

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and sums: fp32, or fp64 if an operand is."""
        return torch.promote_types(torch.promote_types(self.hidden.dtype, self.weight.dtype), torch.float32)

    def blocks(self) -> list[slice]:
        """The vocabulary in pieces."""
        vocab, width = self.weight.shape
        return pieces(vocab, max(1, WEIGHT_BLOCK_ELEMENTS // max(1, width)))


def pieces(length: int, step: int) -> list[slice]:
    """Consecutive slices of `step`, the last one perhaps shorter."""
    return [slice(start, min(length, start + step)) for start in range(0, length, step)]


def forward(
    problem: Problem, chunk_tokens: int | None, wanted: Wanted | None
) -> tuple[torch.Tensor, Softmax, Gradients | None]:
    """Losses of all tokens, [N]; with `wanted`, also the gradients of their sum, wide."""
    losses, peak, total = problem.hidden.new_empty((3, len(problem.labels)), dtype=problem.wide)
    chunks, blocks = pieces(len(problem.labels), chunk_tokens or CHUNK_TOKENS), problem.blocks()
    gradients = _zeros(problem, wanted) if wanted else None
    room = _room(problem, chunks, blocks, shared=gradients is None)
    for chunk in chunks:
        hidden, labels = problem.hidden[chunk].to(problem.wide), problem.labels[chunk]
        buffers = [_corner(buffer, chunk, block) for buffer, block in zip(room, blocks, strict=True)]
        softmax, chosen = _softmax(problem, hidden, labels, blocks, buffers)
        peak[chunk], total[chunk] = softmax
        losses[chunk] = softmax.total.log() + (softmax.peak - chosen)
        if gradients is None:
            continue
        factors = (problem.scale / softmax.total)[:, None]
        weighted = hidden * factors
        for block, logits in zip(blocks, buffers, strict=True):
            errors = _errors(problem, logits, block, labels, softmax)
            part = _part(gradients, chunk, block)
            _accumulate(part, errors, _wide_weight(problem, block), weighted, factors)
        if gradients.hidden is not None:
            gradients.hidden[chunk] *= factors
    return losses, Softmax(peak, total), gradients


def backward(
    problem: Problem,
    softmax: Softmax,
    upstream: torch.Tensor,
    wanted: Wanted,
    weight_dtype: torch.dtype,
    chunk_tokens: int | None,
) -> Gradients:
    """The gradients for the losses' gradient `upstream` [N]: the weight's in `weight_dtype`, the others wide.

    The logits are computed again, of one block of the vocabulary and one chunk of tokens at a time, so that the
    weight's gradient is wide for one block only.
    """
    chunks, blocks = pieces(len(problem.labels), chunk_tokens or CHUNK_TOKENS), problem.blocks()
    gradients = _zeros(problem, Wanted(wanted.hidden, False, wanted.bias))
    weight_gradient = torch.empty_like(problem.weight, dtype=weight_dtype) if wanted.weight else None
    buffer = _room(problem, chunks, blocks, shared=True)[0]
    factors = (upstream * problem.scale / softmax.total)[:, None]
    for block in blocks:
        weight = _wide_weight(problem, block)
        weight_part = torch.zeros_like(weight) if wanted.weight else None
        for chunk in chunks:
            hidden, labels = problem.hidden[chunk].to(problem.wide), problem.labels[chunk]
            logits = _logits(problem, hidden, weight, block, _corner(buffer, chunk, block))
            errors = _errors(problem, logits, block, labels, Softmax(softmax.peak[chunk], softmax.total[chunk]))
            part = _part(gradients, chunk, block)._replace(weight=weight_part)
            _accumulate(part, errors, weight, hidden * factors[chunk], factors[chunk])
        if weight_gradient is not None and weight_part is not None:
            weight_gradient[block] = weight_part
    if gradients.hidden is not None:
        gradients.hidden.mul_(factors)
    return gradients._replace(weight=weight_gradient)


def _zeros(problem: Problem, wanted: Wanted) -> Gradients:
    operands = (problem.hidden, problem.weight, problem.bias)
    return Gradients(
        *(
            torch.zeros(operand.shape, dtype=problem.wide, device=operand.device)
            if want and operand is not None
            else None
            for operand, want in zip(operands, wanted, strict=True)
        )
    )


def _room(
    problem: Problem, chunks: Sequence[slice], blocks: Sequence[slice], *, shared: bool
) -> Sequence[torch.Tensor]:
    """Room for the logits of a chunk in every block; `shared`, the same room for all blocks."""
    tokens = chunks[0].stop if chunks else 0
    widths = [block.stop - block.start for block in blocks]
    if shared:
        return [problem.hidden.new_empty((tokens, max(widths)), dtype=problem.wide)] * len(blocks)
    return [problem.hidden.new_empty((tokens, width), dtype=problem.wide) for width in widths]


def _corner(buffer: torch.Tensor, chunk: slice, block: slice) -> torch.Tensor:
    return buffer[: chunk.stop - chunk.start, : block.stop - block.start]


def _wide_weight(problem: Problem, block: slice) -> torch.Tensor:
    return problem.weight[block].to(problem.wide)


def _logits(
    problem: Problem, hidden: torch.Tensor, weight: torch.Tensor, block: slice, out: torch.Tensor
) -> torch.Tensor:
    torch.mm(hidden, weight.T, out=out)
    if problem.bias is not None:
        out.add_(problem.bias[block])
    if problem.scale != 1.0:
        out.mul_(problem.scale)
    if problem.softcap is not None:
        out.div_(problem.softcap).tanh_().mul_(problem.softcap)
    return out


def _softmax(
    problem: Problem,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    blocks: Sequence[slice],
    buffers: Sequence[torch.Tensor],
) -> tuple[Softmax, torch.Tensor]:
    """m and n of the formula, and the label's logit, of a chunk of tokens; leaves the logits in the buffers."""
    peak = hidden.new_full((len(hidden),), torch.finfo(hidden.dtype).min)  # finite: a block may be -inf throughout
    total, chosen = torch.zeros_like(peak), torch.zeros_like(peak)
    for block, buffer in zip(blocks, buffers, strict=True):
        logits = _logits(problem, hidden, _wide_weight(problem, block), block, buffer)
        higher = torch.maximum(peak, logits.amax(1))
        total = total * (peak - higher).exp_() + (logits - higher[:, None]).exp_().sum(1)
        peak = higher
        column, inside = _columns(labels, block)
        chosen = torch.where(inside, logits.gather(1, column).squeeze(1), chosen)
    return Softmax(peak, total), chosen


def _columns(labels: torch.Tensor, block: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """The label's column within the block, [N, 1], valid where the second tensor says that it lies there, [N]."""
    column = labels - block.start
    last = block.stop - block.start - 1
    return column.clamp(0, last)[:, None], (column >= 0) & (column <= last)


def _errors(
    problem: Problem, logits: torch.Tensor, block: slice, labels: torch.Tensor, softmax: Softmax
) -> torch.Tensor:
    """E of the formula, in place of the logits."""
    slope = None if problem.softcap is None else 1.0 - (logits / problem.softcap).square_()
    errors = logits.sub_(softmax.peak[:, None]).exp_()
    column, inside = _columns(labels, block)
    errors.scatter_add_(1, column, -(softmax.total * inside)[:, None])
    return errors if slope is None else errors.mul_(slope)


def _part(gradients: Gradients, chunk: slice, block: slice) -> Gradients:
    """The rows of the gradients that a chunk of tokens and a block of the vocabulary add to."""
    hidden, weight, bias = (
        None if gradient is None else gradient[rows]
        for gradient, rows in zip(gradients, (chunk, block, block), strict=True)
    )
    return Gradients(hidden, weight, bias)


def _accumulate(
    part: Gradients, errors: torch.Tensor, weight: torch.Tensor, weighted: torch.Tensor, factors: torch.Tensor
) -> None:
    """Add E W, without its factors, and Eᵀ (r·H) and Eᵀ r."""
    if part.hidden is not None:
        part.hidden.addmm_(errors, weight)
    if part.weight is not None:
        part.weight.addmm_(errors.T, weighted)
    if part.bias is not None:
        part.bias.addmv_(errors.T, factors.squeeze(1))
