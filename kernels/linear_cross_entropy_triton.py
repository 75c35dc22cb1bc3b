"""The Triton kernels of `linear_cross_entropy`: logits live in registers, one tile at a time.

    forward    a program goes along `SPAN` columns of the vocabulary for BT tokens with a running maximum and sum and
               leaves both; those of all spans are joined in torch, in a fixed order
    backward   for one block of the vocabulary after another: E = (softmax(z) - onehot) · f' · u from logits computed
               anew, u relative to its largest value; then dW of the block = s·Eᵀ H in one go, and dH += s·E W

E of a block is the only thing of size tokens x columns; it is rounded to the operands' dtype. No atomic operation, so
the same bits every time. dW is summed over all tokens in fp32 inside its kernel and rounded once: no fp32 copy exists.
Formulas: `regraft.kernels.linear_cross_entropy`; the forward pass is that of Cut Cross-Entropy (arXiv 2411.09009).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from regraft.kernels.linear_cross_entropy_chunked import Gradients, Problem, Softmax, Wanted
from regraft.kernels.rounding_triton import round_to_nearest

SPAN = 2048
"""Columns of the vocabulary for one program of the forward pass; a multiple of every tile's width."""

ERROR_ELEMENTS = 1 << 25
"""Elements of E held at a time: 64 MB in bf16. The block of the vocabulary is what that allows, down to `MIN_BLOCK`."""

MIN_BLOCK, MAX_BLOCK = 512, 8192

_TILES = {2: (64, 128, 32), 4: (64, 64, 16)}
"""Rows, columns and depth of a tile by the bytes of an operand: with eight warps 128 registers at most and no spills,
two blocks on a multiprocessor (`benchmarks/kernel_resources.py`); with four warps 150 to 255, one or two."""

OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}

_NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """tanh to about 2e-7 relative; the series up to 0.15, where 1 - exp(-2x) would cancel."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = size * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    value = tl.where(size < 0.15, near, far)
    return tl.where(x < 0.0, -value, value)


@triton.jit  # type: ignore[untyped-decorator]
def logits_tile(  # type: ignore[no-untyped-def]  # noqa: ANN201
    h_ptr, w_ptr, b_ptr, i_t, i_v,  # noqa: ANN001
    tokens, vocab, width, scale, softcap,  # noqa: ANN001
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """z [BT, BV] of tokens i_t and vocabulary i_v, in fp32; H [tokens, width] and W [vocab, width] row-major."""
    m_t, m_v = i_t < tokens, i_v < vocab
    p_h = h_ptr + i_t.to(tl.int64)[:, None] * width
    p_w = w_ptr + i_v.to(tl.int64)[:, None] * width
    b_z = tl.zeros((BT, BV), dtype=tl.float32)
    for start in range(0, width, BD):
        i_d = start + tl.arange(0, BD)
        m_d = i_d < width
        b_h = tl.load(p_h + i_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
        b_w = tl.load(p_w + i_d[None, :], mask=m_v[:, None] & m_d[None, :], other=0.0)
        b_z = tl.dot(b_h.to(DOT), tl.trans(b_w.to(DOT)), b_z, input_precision="ieee")
    if BIASED:
        b_z += tl.load(b_ptr + i_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    b_z *= scale
    if CAPPED:
        b_z = softcap * tanh(b_z / softcap)
    return b_z


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    h_ptr, w_ptr, b_ptr, y_ptr, peak_ptr, total_ptr, chosen_ptr,  # noqa: ANN001
    tokens, vocab, width, scale, softcap,  # noqa: ANN001
    SPAN: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Peak and total [spans, tokens] of a span of the vocabulary; the label's logit [tokens], if the span has it."""
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * SPAN
    last = tl.minimum(first + SPAN, vocab)
    m_t = i_t < tokens
    b_y = tl.load(y_ptr + i_t, mask=m_t, other=-1)
    b_max = tl.full((BT,), -3.4e38, dtype=tl.float32)  # finite: a tile may be -inf throughout
    b_sum = tl.zeros((BT,), dtype=tl.float32)
    b_chosen = tl.zeros((BT,), dtype=tl.float32)
    for start in range(first, last, BV):
        i_v = start + tl.arange(0, BV)
        b_z = logits_tile(
            h_ptr, w_ptr, b_ptr, i_t, i_v, tokens, vocab, width, scale, softcap, BT, BV, BD, BIASED, CAPPED, DOT
        )
        b_chosen += tl.sum(tl.where(i_v[None, :] == b_y[:, None], b_z, 0.0), 1)
        b_z = tl.where((i_v < vocab)[None, :], b_z, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_z, 1))
        b_sum = b_sum * tl.exp(b_max - b_new) + tl.sum(tl.exp(b_z - b_new[:, None]), 1)
        b_max = b_new
    i_out = tl.program_id(1).to(tl.int64) * tokens + i_t
    tl.store(peak_ptr + i_out, b_max, mask=m_t)
    tl.store(total_ptr + i_out, b_sum, mask=m_t)
    tl.store(chosen_ptr + i_t, b_chosen, mask=m_t & (b_y >= first) & (b_y < last))


@triton.jit  # type: ignore[untyped-decorator]
def errors_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    h_ptr, w_ptr, b_ptr, y_ptr, peak_ptr, total_ptr, u_ptr, out_ptr,  # noqa: ANN001
    tokens, vocab, width, first, columns, stride, scale, softcap,  # noqa: ANN001
    BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    BIASED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BV] of E for the columns first ... first + columns of the vocabulary; rows of `out` by `stride`."""
    i_t = tl.program_id(0) * BT + tl.arange(0, BT)
    i_c = tl.program_id(1) * BV + tl.arange(0, BV)
    i_v = first + i_c
    m_t = i_t < tokens
    b_z = logits_tile(
        h_ptr, w_ptr, b_ptr, i_t, i_v, tokens, vocab, width, scale, softcap, BT, BV, BD, BIASED, CAPPED, DOT
    )
    b_y = tl.load(y_ptr + i_t, mask=m_t, other=-1)
    b_max = tl.load(peak_ptr + i_t, mask=m_t, other=0.0)
    b_sum = tl.load(total_ptr + i_t, mask=m_t, other=1.0)
    b_u = tl.load(u_ptr + i_t, mask=m_t, other=0.0)
    b_e = tl.exp(b_z - b_max[:, None]) * (1.0 / b_sum)[:, None] - tl.where(i_v[None, :] == b_y[:, None], 1.0, 0.0)
    if CAPPED:
        b_f = b_z / softcap
        b_e *= 1.0 - b_f * b_f
    b_e *= b_u[:, None]
    p_out = out_ptr + i_t.to(tl.int64)[:, None] * stride + i_c[None, :]
    tl.store(p_out, round_to_nearest(b_e, out_ptr.dtype.element_ty), mask=m_t[:, None] & (i_c < columns)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    a_ptr, b_ptr, out_ptr, factor_ptr,  # noqa: ANN001
    rows, cols, depth, stride,  # noqa: ANN001
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
    TURNED: tl.constexpr, ADDED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile [BR, BC] of factor·A B, added to `out` if ADDED; A [rows, depth], TURNED: stored [depth, rows].

    A's stored rows lie `stride` apart; B [depth, cols] and out [rows, cols] are row-major.
    """
    i_r = tl.program_id(0) * BR + tl.arange(0, BR)
    i_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_r, m_c = i_r < rows, i_c < cols
    b_p = tl.zeros((BR, BC), dtype=tl.float32)
    for start in range(0, depth, BK):
        i_k = start + tl.arange(0, BK)
        m_k = i_k < depth
        p_b = b_ptr + i_k.to(tl.int64)[:, None] * cols + i_c[None, :]
        b_b = tl.load(p_b, mask=m_k[:, None] & m_c[None, :], other=0.0)
        if TURNED:
            p_a = a_ptr + i_k.to(tl.int64)[:, None] * stride + i_r[None, :]
            b_a = tl.trans(tl.load(p_a, mask=m_k[:, None] & m_r[None, :], other=0.0))
        else:
            p_a = a_ptr + i_r.to(tl.int64)[:, None] * stride + i_k[None, :]
            b_a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)
        b_p = tl.dot(b_a.to(DOT), b_b.to(DOT), b_p, input_precision="ieee")
    b_p *= tl.load(factor_ptr)
    p_out = out_ptr + i_r.to(tl.int64)[:, None] * cols + i_c[None, :]
    mask = m_r[:, None] & m_c[None, :]
    if ADDED:
        b_p += tl.load(p_out, mask=mask, other=0.0)
    tl.store(p_out, round_to_nearest(b_p, out_ptr.dtype.element_ty), mask=mask)


def forward(problem: Problem) -> tuple[torch.Tensor, Softmax]:
    """Losses of the tokens, [N], fp32; at least one token, and labels within the vocabulary."""
    problem, constants = _contiguous(problem), _constants(problem)
    tokens, vocab = len(problem.labels), len(problem.weight)
    spans = triton.cdiv(vocab, SPAN)
    peaks, totals = problem.hidden.new_empty((2, spans, tokens), dtype=torch.float32)
    chosen = torch.empty_like(peaks[0])
    grid = (triton.cdiv(tokens, constants["BT"]), spans)
    forward_kernel[grid](
        problem.hidden, problem.weight, problem.bias, problem.labels, peaks, totals, chosen,
        tokens, vocab, problem.hidden.shape[1], problem.scale, problem.softcap or 1.0,
        SPAN=SPAN, **constants, **OPTIONS,
    )  # fmt: skip
    peak = peaks.amax(0)
    total = ((peaks - peak).exp_() * totals).sum(0)
    return total.log() + (peak - chosen), Softmax(peak, total)


def backward(
    problem: Problem, softmax: Softmax, upstream: torch.Tensor, wanted: Wanted, weight_dtype: torch.dtype
) -> Gradients:
    """The gradients for the losses' gradient `upstream` [N]: the weight's in `weight_dtype`, the others fp32."""
    problem, constants = _contiguous(problem), _constants(problem)
    hidden, weight = problem.hidden, problem.weight
    tokens, vocab = len(problem.labels), len(weight)
    grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if wanted.hidden else None
    grad_weight = torch.empty_like(weight, dtype=weight_dtype) if wanted.weight else None
    grad_bias = weight.new_empty(vocab, dtype=torch.float32) if wanted.bias else None
    # E holds u relative to its largest value: 1 / tokens, or a loss scale, would leave the range of fp16
    peak = upstream.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    relative, factor = (upstream / peak).contiguous(), (peak * problem.scale).to(torch.float32)
    columns = _block_columns(tokens, vocab)
    errors = hidden.new_empty((tokens, columns), dtype=torch.promote_types(hidden.dtype, weight.dtype))
    for first in range(0, vocab, columns):
        block = slice(first, min(vocab, first + columns))
        count = block.stop - first
        errors_kernel[(triton.cdiv(tokens, constants["BT"]), triton.cdiv(count, constants["BV"]))](
            hidden, weight, problem.bias, problem.labels, softmax.peak, softmax.total, relative, errors,
            tokens, vocab, hidden.shape[1], first, count, columns, problem.scale, problem.softcap or 1.0,
            **constants, **OPTIONS,
        )  # fmt: skip
        if grad_weight is not None:
            _product(errors[:, :count].T, hidden, grad_weight[block], factor, turned=True, added=False)
        if grad_hidden is not None:
            _product(errors[:, :count], weight[block], grad_hidden, factor, turned=False, added=first > 0)
        if grad_bias is not None:
            grad_bias[block] = errors[:, :count].sum(0, dtype=torch.float32) * factor
    return Gradients(grad_hidden, grad_weight, grad_bias)


def _product(
    left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, factor: torch.Tensor, *, turned: bool, added: bool
) -> None:
    dtype = torch.promote_types(left.dtype, right.dtype)
    rows, cols, depth = _TILES[dtype.itemsize]
    grid = (triton.cdiv(len(left), rows), triton.cdiv(right.shape[1], cols))
    product_kernel[grid](
        left, right, out, factor, len(left), right.shape[1], len(right), left.stride(1 if turned else 0),
        BR=rows, BC=cols, BK=depth, TURNED=turned, ADDED=added, DOT=_dot(dtype), **OPTIONS,
    )  # fmt: skip


def _block_columns(tokens: int, vocab: int) -> int:
    """Columns of E at a time, a multiple of 16 so that its rows load in vectors."""
    room = max(MIN_BLOCK, min(MAX_BLOCK, ERROR_ELEMENTS // tokens))
    return min(room // 16 * 16, -(-vocab // 16) * 16)


def _contiguous(problem: Problem) -> Problem:
    hidden, weight, labels = problem.hidden.contiguous(), problem.weight.contiguous(), problem.labels.contiguous()
    bias = None if problem.bias is None else problem.bias.contiguous()
    return Problem(hidden, weight, bias, labels, problem.softcap, problem.scale)


def _constants(problem: Problem) -> dict[str, Any]:
    dtype = torch.promote_types(problem.hidden.dtype, problem.weight.dtype)
    rows, cols, depth = _TILES[dtype.itemsize]
    flags = {"BIASED": problem.bias is not None, "CAPPED": problem.softcap is not None}
    return {"BT": rows, "BV": cols, "BD": depth, **flags, "DOT": _dot(dtype)}


def _dot(dtype: torch.dtype) -> Any:
    """What the products multiply; fp32 in the interpreter, whose bf16 product is garbage."""
    return tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else _NAMES[dtype]


def builds() -> dict[str, dict[str, Any]]:
    """Every form of the kernels that is shipped, by name, as arguments of an ahead-of-time build.

    A head as most have it, without bias and softcap, in three dtypes; with both in bf16. Sizes are multiples of 16.
    """
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for full in (False, True) if name == "bf16" else (False,):
            label = f"{name}, bias, softcap" if full else name
            found[f"linear_cross_entropy.forward[{label}]"] = _tile_build(forward_kernel, name, dtype, full)
            found[f"linear_cross_entropy.errors[{label}]"] = _tile_build(errors_kernel, name, dtype, full)
        rows, cols, depth = _TILES[dtype.itemsize]
        for use, turned, out in (("weight", True, name), ("hidden", False, "fp32")):
            types = {"a_ptr": f"*{name}", "b_ptr": f"*{name}", "out_ptr": f"*{out}", "factor_ptr": "*fp32"}
            tile = {"BR": rows, "BC": cols, "BK": depth}
            constants = {**tile, "TURNED": turned, "ADDED": not turned, "DOT": _NAMES[dtype]}
            found[f"linear_cross_entropy.{use}[{name}]"] = _build(product_kernel, types, constants)
    return found


def _tile_build(function: Any, name: str, dtype: torch.dtype, full: bool) -> dict[str, Any]:
    rows, cols, depth = _TILES[dtype.itemsize]
    types = {"h_ptr": f"*{name}", "w_ptr": f"*{name}", "b_ptr": f"*{name}", "y_ptr": "*i64"}
    types |= {"peak_ptr": "*fp32", "total_ptr": "*fp32", "chosen_ptr": "*fp32", "u_ptr": "*fp32", "out_ptr": f"*{name}"}
    types |= {"scale": "fp32", "softcap": "fp32"}
    constants = {"BT": rows, "BV": cols, "BD": depth, "BIASED": full, "CAPPED": full, "DOT": _NAMES[dtype]}
    constants |= {} if full else {"b_ptr": None}
    return _build(function, types, constants | ({"SPAN": SPAN} if function is forward_kernel else {}))


def _build(function: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    """Arguments without a type are 32-bit sizes; pointers and sizes are marked as multiples of 16."""
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in function.arg_names}
    marked = [index for index, kind in enumerate(signature.values()) if kind[0] == "*" or kind == "i32"]
    return {
        "function": function,
        "signature": signature,
        "constants": constants,
        "attributes": {(index,): [["tt.divisibility", 16]] for index in marked},
        "options": OPTIONS,
    }
