"""Cross-entropy and log-probabilities straight from hidden states and head, never holding tokens x vocabulary.

    z = f(s·(H Wᵀ + b)),  f(x) = c·tanh(x / c) with a softcap c, x without
    log p = z[label] - lse(z)           loss = -log p, of the tokens whose label counts

`reference` is the specification. `linear_cross_entropy_chunked` computes it in torch, a chunk of tokens at a time;
`linear_cross_entropy_triton` on CUDA, a tile of logits at a time. Sums are fp32 (fp64 where an operand is).
Tokens whose label is `ignore_index` are left out before anything is computed: they cost nothing, and a NaN there
reaches nothing. Under autocast hidden states and weight are rounded to its dtype first, as a linear layer does.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

from regraft.kernels import linear_cross_entropy_chunked as chunked
from regraft.kernels.linear_cross_entropy_chunked import Gradients, Problem, Softmax, Wanted

Implementation = Literal["auto", "torch", "triton"]
Reduction = Literal["mean", "sum", "none"]

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """The specification of `linear_cross_entropy`; with `none` and the sign turned, of `linear_log_probs`."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    logits = F.linear(hidden.to(wide), weight.to(wide), None if bias is None else bias.to(wide)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Cross-entropy of the head's logits against labels, differentiable once, in fp32 (fp64 for fp64 operands).

    Shapes: T tokens, D hidden size, V vocabulary.

    Args:
        hidden: [T, D], any float dtype.
        weight: [V, D], any float dtype.
        labels: [T], int64; the caller has shifted them.
        bias: [V], added before scale and softcap.
        ignore_index: the label of tokens that do not count.
        reduction: `mean` over the tokens that count, `sum`, or `none`: [T], 0 where ignored. Without any token that
            counts the mean is NaN and its gradients are 0, as with `torch.nn.functional.cross_entropy`.
        softcap: c of c·tanh(z / c), above 0 (`final_logit_softcapping` of Gemma 2).
        logit_scale: s, a factor of the logits (`logit_scale` of Cohere, 1 / `logits_scaling` of Granite).
        chunk_tokens: tokens whose logits the torch implementation holds at a time; by default 256.
        implementation: `auto` takes Triton for CUDA tensors that its kernels support and torch elsewhere.

    Memory beyond operands and gradients: one chunk of logits; for a summed loss in torch the gradients are fp32 until
    the backward pass has scaled them. An operand that does not require a gradient costs none. On CUDA the labels are
    read back, to find those that count and those out of range. The weight is a plain tensor: gather a sharded one.

    Raises:
        ValueError: shapes, dtypes or options do not fit.
        IndexError: a label outside the vocabulary.
        RuntimeError: `triton` is asked for where it cannot run; a gradient of the gradient.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is mean, sum or none, not {reduction!r}")
    total = reduction != "none"
    options = _Options.of(hidden, weight, softcap, logit_scale, chunk_tokens, implementation, total)
    losses, rows = _losses(hidden, weight, bias, labels, ignore_index, options)
    if reduction == "none":
        return _spread(losses, rows, len(labels))
    return losses if reduction == "sum" else losses / (len(labels) if rows is None else len(rows))


def linear_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """The log-probability of every token's label, [T], 0 where ignored; arguments and errors as `linear_cross_entropy`.

    The tokens may have any gradients, so logits are computed again in the backward pass where the head learns; with a
    frozen head the gradient of the hidden states is made in the forward pass, as for a summed loss.
    """
    options = _Options.of(hidden, weight, softcap, logit_scale, chunk_tokens, implementation, total=False)
    losses, rows = _losses(hidden, weight, bias, labels, ignore_index, options)
    return _spread(-losses, rows, len(labels))


@dataclass(frozen=True)
class _Options:
    softcap: float | None
    scale: float
    chunk_tokens: int | None
    implementation: Literal["torch", "triton"]
    cast: torch.dtype | None
    """What autocast rounds the operands to."""
    total: bool
    """Whether the losses are summed."""

    @staticmethod
    def of(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        softcap: float | None,
        scale: float,
        chunk_tokens: int | None,
        implementation: Implementation,
        total: bool,
    ) -> _Options:
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap is a number above 0, not {softcap}")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is 1 or more, not {chunk_tokens}")
        device = hidden.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        if torch.float64 in (hidden.dtype, weight.dtype):
            cast = None
        return _Options(softcap, float(scale), chunk_tokens, _chosen(implementation, hidden, weight), cast, total)

    def problem(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
    ) -> Problem:
        hidden, weight = hidden.to(self.cast or hidden.dtype), weight.to(self.cast or weight.dtype)
        return Problem(hidden, weight, bias, labels, self.softcap, self.scale)


def _chosen(implementation: Implementation, hidden: torch.Tensor, weight: torch.Tensor) -> Literal["torch", "triton"]:
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"implementation is auto, torch or triton, not {implementation!r}")
    fault = _triton_fault(hidden, weight)
    if implementation == "triton" and fault:
        raise RuntimeError(f"the Triton implementation of linear_cross_entropy cannot run: {fault}")
    if implementation == "auto":
        return "torch" if fault or not hidden.is_cuda else "triton"
    return implementation


def _triton_fault(hidden: torch.Tensor, weight: torch.Tensor) -> str:
    for dtype in (hidden.dtype, weight.dtype):
        if dtype not in _TRITON_DTYPES:
            return f"its kernels do not take {dtype}"
    if not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {hidden.device}, not on a CUDA device"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    options: _Options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The losses of the tokens that count, or their sum; and which tokens these are, None if all are."""
    _check(hidden, weight, bias, labels)
    rows = _rows_that_count(labels, ignore_index)
    if rows is not None:
        hidden, labels = hidden.index_select(0, rows), labels.index_select(0, rows)
    _check_labels(labels, rows, len(weight))
    learns = any(operand is not None and operand.requires_grad for operand in (hidden, weight, bias))
    if learns and torch.is_grad_enabled():
        return _HeadLosses.apply(hidden, weight, bias, labels, options), rows  # type: ignore[no-untyped-call]
    losses, _, _ = _forward(options.problem(hidden, weight, bias, labels), options, None)
    return losses.sum() if options.total else losses, rows


def _rows_that_count(labels: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    rows = (labels != ignore_index).nonzero().squeeze(1)
    return None if len(rows) == len(labels) else rows


def _check(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor) -> None:
    operands = {"hidden": hidden, "weight": weight, "labels": labels, **({} if bias is None else {"bias": bias})}
    shapes = {name: tuple(operand.shape) for name, operand in operands.items()}
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and len(weight) > 0
    fits = fits and labels.shape == hidden.shape[:1] and (bias is None or bias.shape == weight.shape[:1])
    if not fits:
        raise ValueError(f"shapes do not fit hidden [T, D], weight [V, D], labels [T], bias [V]: {shapes}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are int64, not {labels.dtype}")
    if any(not operand.is_floating_point() for name, operand in operands.items() if name != "labels"):
        raise ValueError(f"hidden, weight and bias are floats, not {[str(item.dtype) for item in operands.values()]}")
    if len({operand.device for operand in operands.values()}) > 1:
        raise ValueError(
            f"operands on several devices: { {name: str(item.device) for name, item in operands.items()} }"
        )


def _check_labels(labels: torch.Tensor, rows: torch.Tensor | None, vocab: int) -> None:
    outside = ((labels < 0) | (labels >= vocab)).nonzero().squeeze(1)
    if len(outside):
        first = int(outside[0])
        token = first if rows is None else int(rows[first])
        raise IndexError(f"label {int(labels[first])} of token {token} is outside the vocabulary of {vocab} rows")


def _spread(losses: torch.Tensor, rows: torch.Tensor | None, tokens: int) -> torch.Tensor:
    return losses if rows is None else losses.new_zeros(tokens).index_copy(0, rows, losses)


class _HeadLosses(torch.autograd.Function):
    """Losses [N] of tokens that all count, or their sum."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        options: _Options,
    ) -> torch.Tensor:
        ctx.options, ctx.wanted, ctx.empty = options, Wanted(*ctx.needs_input_grad[:3]), not len(labels)
        at_once = options.total or not (ctx.wanted.weight or ctx.wanted.bias)
        problem = options.problem(hidden, weight, bias, labels)
        losses, softmax, ctx.gradients = _forward(problem, options, ctx.wanted if at_once else None)
        ctx.dtypes = [None if operand is None else operand.dtype for operand in (hidden, weight, bias)]
        ctx.save_for_backward(hidden, weight, bias, labels, *softmax)
        return losses.sum() if options.total else losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "linear_cross_entropy has a first derivative only; for a gradient of the gradient (create_graph=True) "
                "use regraft.kernels.linear_cross_entropy.reference"
            )
        upstream = torch.zeros_like(upstream) if ctx.empty else upstream  # a mean of nothing sends infinity
        # the first backward pass takes the gradients away and scales them in place; another computes them anew
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            hidden, weight, bias, labels, *softmax = ctx.saved_tensors
            problem = ctx.options.problem(hidden, weight, bias, labels)
            each = upstream.expand(len(labels))
            gradients = _backward(problem, ctx.options, Softmax(*softmax), each, ctx.wanted, weight.dtype)
        else:
            _scale(gradients, upstream)
        casts = (None if item is None else item.to(dtype) for item, dtype in zip(gradients, ctx.dtypes, strict=True))
        return (*casts, None, None)


def _scale(gradients: Gradients, upstream: torch.Tensor) -> None:
    """Multiply in place by the gradient of the sum, or of each token's loss, which only hidden states can have."""
    factor = upstream if upstream.ndim == 0 else upstream[:, None]
    for gradient in gradients:
        if gradient is not None:
            gradient.mul_(factor)


def _forward(
    problem: Problem, options: _Options, wanted: Wanted | None
) -> tuple[torch.Tensor, Softmax, Gradients | None]:
    """Losses [N]; from torch also the gradients of the summed losses, where wanted."""
    if options.implementation == "triton" and len(problem.labels):
        from regraft.kernels import linear_cross_entropy_triton as fused

        with torch.cuda.device_of(problem.hidden):  # type: ignore[no-untyped-call]
            return (*fused.forward(problem), None)
    return chunked.forward(problem, options.chunk_tokens, wanted)


def _backward(
    problem: Problem,
    options: _Options,
    softmax: Softmax,
    upstream: torch.Tensor,
    wanted: Wanted,
    weight_dtype: torch.dtype,
) -> Gradients:
    if options.implementation == "triton" and len(problem.labels):
        from regraft.kernels import linear_cross_entropy_triton as fused

        with torch.cuda.device_of(problem.hidden):  # type: ignore[no-untyped-call]
            return fused.backward(problem, softmax, upstream, wanted, weight_dtype)
    return chunked.backward(problem, softmax, upstream, wanted, weight_dtype, options.chunk_tokens)
