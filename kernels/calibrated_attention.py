"""Attention calibration: attention whose weight on sink keys is cut to a share, the rest given to the other keys.

Yu et al., "Unveiling and Harnessing Hidden Attention Sinks" (ICML 2024, arXiv 2406.15765), with sinks found for any
batch, padding and decoding step. Formulas and legend: `regraft.kernels.calibrated_attention_chunked`.

`reference` is the specification: it holds all weights. `calibrated_attention_chunked` computes the same in torch, some
rows at a time; `calibrated_attention_triton` on CUDA in two quadratic sweeps that keep O and the rows' log-sum-exp,
behind which only the few columns that hold sinks are computed again: out = g O + (beta - g) O_Z.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

import torch

from regraft.kernels.calibrated_attention_chunked import (
    PIECE_ELEMENTS,
    Calibration,
    Memory,
    Sight,
    Work,
    calibrated_chunked,
    corrected,
    running_sinks,
    sinks_of,
    threshold_of,
)

Implementation = Literal["auto", "torch", "triton"]

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_WIDEST = 128
_SLACK = 1 - 1e-3
"""Suspects are found from sums in another order than those that decide: a little too many rather than one too few."""


def reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calibration: Calibration,
    *,
    padding: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification of `calibrated_attention`, of as many queries as keys: output, A' and Z, [B, H, L, L] each."""
    wide = torch.promote_types(value.dtype, torch.float32)
    batch, heads, length, width = query.shape
    repeated = (one.to(wide).repeat_interleave(heads // key.shape[1], 1) for one in (key, value))
    keys, values = repeated
    scores = query.to(wide) @ keys.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    there = torch.ones(batch, length, dtype=torch.bool, device=query.device) if padding is None else padding
    seen = torch.ones(length, length, dtype=torch.bool, device=query.device).tril() & there[:, None]
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
    sinks = _reference_sinks(weights, seen, there, calibration)
    on_sinks, left = (weights * sinks).sum(-1, keepdim=True), (weights * ~sinks).sum(-1, keepdim=True)
    gain = (1 - calibration.beta * on_sinks) / left
    changed = torch.where(sinks, calibration.beta * weights, gain * weights)
    changed = torch.where(left < 1e-20, weights, changed)
    return (changed @ values).to(value.dtype), changed, sinks


def _reference_sinks(
    weights: torch.Tensor, seen: torch.Tensor, there: torch.Tensor, calibration: Calibration
) -> torch.Tensor:
    counted = (seen & there[:, :, None]).to(weights.dtype)[:, None]
    in_sight = seen.sum(-1).clamp_min(1)[:, None, :, None]
    if calibration.causal:
        sums, counts = (weights * counted).cumsum(2), counted.cumsum(2)
    else:
        sums, counts = (weights * counted).sum(2, keepdim=True), counted.sum(2, keepdim=True)
        in_sight = in_sight.amax(2, keepdim=True)
    threshold = calibration.tau / in_sight if calibration.relative else calibration.tau
    sinks = (sums > threshold * counts) & (counts >= calibration.min_queries)
    if calibration.spare_first:
        first = there.int().argmax(-1)[:, None, None, None]
        sinks = sinks & (torch.arange(weights.shape[-1], device=weights.device) != first)
    return sinks.expand_as(weights)


def calibrated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calibration: Calibration,
    *,
    padding: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    offset: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    memory: Memory | None = None,
    implementation: Implementation = "auto",
) -> tuple[torch.Tensor, Memory]:
    """Calibrated causal attention; arguments, shapes and result as `calibrated_chunked`.

    Memory beyond operands and result: a piece of weights, and of [rows, columns that hold sinks]. Gradients flow
    through the torch implementation, Z held fixed.

    Args:
        query, key, value, calibration, padding, mask, offset, scale, softcap, memory: see `calibrated_chunked`.
        implementation: `auto` takes Triton for CUDA tensors and calls that its kernels support, and torch elsewhere.
            They support a prompt from its start, without `mask`, heads of 128 at most, and no gradients.

    Raises:
        ValueError: shapes or options do not fit.
        RuntimeError: `triton` is asked for where it cannot run.
    """
    _check(query, key, value, calibration, padding, mask, offset, memory)
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"implementation is auto, torch or triton, not {implementation!r}")
    fault = _triton_fault(query, key, value, mask, offset, memory)
    if implementation == "triton" and fault:
        raise RuntimeError(f"the Triton implementation of calibrated_attention cannot run: {fault}")
    if implementation == "triton" or (implementation == "auto" and not fault and query.is_cuda):
        return _fused(query, key, value, calibration, padding, scale, softcap)
    return calibrated_chunked(
        query, key, value, calibration,
        padding=padding, mask=mask, offset=offset, scale=scale, softcap=softcap, memory=memory,
    )  # fmt: skip


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calibration: Calibration,
    padding: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[torch.Tensor, Memory]:
    from regraft.kernels import calibrated_attention_triton as fused

    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        output, lse, sums, peak = fused.sweeps(query, key, value, padding, calibration, scale, softcap)
    sight = Sight(padding, None, 0, key)
    work = Work(query, key.float(), value.float(), sight, scale, softcap)
    length, keys = query.shape[2], torch.arange(key.shape[2], device=key.device)
    own = sight.real(0, length).float()
    real = own.sum(-1)
    counts = (length - keys).float()[None] if padding is None else (real[:, None] - (own.cumsum(-1) - own)) * own
    counts = counts.expand(len(key), -1)
    sinks = None
    if calibration.causal:
        columns = (peak > _SLACK).flatten(0, 1).any(0).nonzero()[:, 0]
    else:
        threshold = threshold_of(calibration, sight, 0, length).amin(-1)[:, None, None]
        sinks = sinks_of(sums, counts[:, None], threshold, keys, sight.first()[:, None, None], calibration)
        columns = sinks.flatten(0, 1).any(0).nonzero()[:, 0]
    output, mass = _mended(work, calibration, output, lse, columns, sinks)
    return output.to(value.dtype), Memory(sums, counts.clone(), mass, real, sinks, length)


def _mended(
    work: Work,
    calibration: Calibration,
    output: torch.Tensor,
    lse: torch.Tensor,
    columns: torch.Tensor,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, written in place with the weight on sinks cut, and s summed over rows; `columns` alone hold sinks."""
    mass = torch.zeros_like(lse[..., 0])
    if not len(columns):
        return output, mass
    batch, heads, length = lse.shape
    sums, counts = lse.new_zeros(batch, heads, len(columns)), lse.new_zeros(batch, len(columns))
    size = max(32, PIECE_ELEMENTS // (batch * heads * len(columns)))
    for start in range(0, length, size):
        stop = min(start + size, length)
        part = work.sparse(lse[:, :, start:stop], columns, start, stop)
        if sinks is None:
            chosen, sums, counts = running_sinks(work.sight, part, columns, sums, counts, calibration, start, stop)
        else:
            chosen = sinks[:, :, None, columns]
        seen = columns < stop  # a row that is computed anew has no keys behind the piece
        near = columns[seen]
        if len(near):
            piece, on_sinks = corrected(
                work, output[:, :, start:stop], part[..., seen], near, chosen[..., seen],
                calibration.beta, start, stop,
            )  # fmt: skip
            output[:, :, start:stop] = piece
            mass += (on_sinks * work.sight.real(start, stop).float()[:, None]).sum(-1)
    return output, mass


def _triton_fault(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    offset: int,
    memory: Memory | None,
) -> str:
    operands = (query, key, value)
    for one in operands:
        if one.dtype not in _TRITON_DTYPES:
            return f"its kernels do not take {one.dtype}"
    if torch.is_grad_enabled() and any(one.requires_grad for one in operands):
        return "it has no gradients"
    if mask is not None or offset or memory is not None or query.shape[2] != key.shape[2]:
        return "it takes whole prompts without a mask"
    if value.shape[-1] != query.shape[-1] or query.shape[-1] > _WIDEST:
        return f"its heads are at most {_WIDEST} wide, keys as wide as values"
    if not query.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {query.device}, not on a CUDA device"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    calibration: Calibration,
    padding: torch.Tensor | None,
    mask: torch.Tensor | None,
    offset: int,
    memory: Memory | None,
) -> None:
    shapes = {"query": tuple(query.shape), "key": tuple(key.shape), "value": tuple(value.shape)}
    fits = query.ndim == key.ndim == value.ndim == 4 and query.shape[::3] == key.shape[::3]
    fits = fits and key.shape[:3] == value.shape[:3] and query.shape[1] % key.shape[1] == 0
    if not fits or offset + query.shape[2] > key.shape[2]:
        raise ValueError(f"shapes do not fit [B, H, L, d], [B, G, K, d], [B, G, K, e] at offset {offset}: {shapes}")
    if padding is not None and (padding.dtype != torch.bool or padding.shape != key.shape[::2]):
        raise ValueError(f"padding is bool [B, K], not {padding.dtype} {tuple(padding.shape)}")
    if mask is not None and (
        padding is not None or mask.shape[1] != 1 or mask.shape[2:] != (query.shape[2], key.shape[2])
    ):
        raise ValueError(f"mask is [B or 1, 1, L, K] and takes the place of padding, not {tuple(mask.shape)}")
    if not 0 <= calibration.beta <= 1 or not calibration.tau > 0:
        raise ValueError(f"beta is from 0 to 1, and tau above 0: {calibration}")
    if offset != (0 if memory is None else memory.rows):
        raise ValueError(f"rows begin at {offset}, and the memory ends at {0 if memory is None else memory.rows}")
