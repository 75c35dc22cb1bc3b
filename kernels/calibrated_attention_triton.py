"""The Triton kernels of `calibrated_attention`: two quadratic sweeps that leave O, the rows' log-sum-exp and columns.

    forward    a program goes along the keys for BQ rows with a running maximum and sum: O and LSE, as flash attention
    columns    a program goes down the rows for BK keys: c[k] = sum of exp(S - LSE), from scores computed anew, and the
               highest c[k] / (threshold n[k]) that a tile of rows may have reached, never too low

There are no atomics, so the same operands give the same bits. What few columns hold sinks is corrected in torch.
Formulas: `regraft.kernels.calibrated_attention_chunked`; the forward pass is that of FlashAttention-2 (2307.08691).
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl

from regraft.kernels.calibrated_attention_chunked import Calibration

_TILES = {2: (64, 64), 4: (32, 32)}
"""Rows and keys of a tile by the bytes of an operand (`benchmarks/kernel_resources.py` shows registers and spills)."""

OPTIONS: dict[str, Any] = {"num_warps": 8, "num_stages": 2, "enable_fp_fusion": True, "maxnreg": 168}
_NAMES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit  # type: ignore[untyped-decorator]
def scores_tile(  # type: ignore[no-untyped-def]  # noqa: ANN201
    b_q, p_k, i_q, i_k, m_k, real_ptr, width, scale, softcap,  # noqa: ANN001
    BD: tl.constexpr, PADDED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Scores [BQ, BK] of queries [BQ, BD], -inf where a key is not seen; `p_k` points at the keys' rows."""
    i_d = tl.arange(0, BD)
    b_k = tl.load(p_k[:, None] + i_d[None, :], mask=m_k[:, None] & (i_d < width)[None, :], other=0.0)
    b_s = tl.dot(b_q.to(DOT), tl.trans(b_k.to(DOT)), input_precision="ieee") * scale
    if CAPPED:
        e = tl.exp(-2.0 * tl.abs(b_s) / softcap)
        b_s = tl.where(b_s < 0.0, -softcap, softcap) * (1.0 - e) / (1.0 + e)
    seen = (i_k[None, :] <= i_q[:, None]) & m_k[None, :]
    if PADDED:
        seen = seen & (tl.load(real_ptr + i_k, mask=m_k, other=0) > 0)[None, :]
    return tl.where(seen, b_s, float("-inf"))


@triton.jit  # type: ignore[untyped-decorator]
def forward_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    q_ptr, k_ptr, v_ptr, real_ptr, out_ptr, lse_ptr,  # noqa: ANN001
    heads, group, length, width, scale, softcap,  # noqa: ANN001
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    PADDED: tl.constexpr, CAPPED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """O [B·H, length, width] and LSE [B·H, length] of BQ rows of a head; Q likewise, K and V [B·H / group, ...]."""
    i_h = tl.program_id(1).to(tl.int64)
    i_q = tl.program_id(0) * BQ + tl.arange(0, BQ)
    i_d = tl.arange(0, BD)
    m_q, m_d = i_q < length, i_d < width
    real_ptr += (i_h // heads) * length
    rows = i_h * length + i_q
    b_q = tl.load(q_ptr + rows[:, None] * width + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)
    b_max = tl.full((BQ,), -1e30, dtype=tl.float32)  # finite: a row may see no key of a tile
    b_sum = tl.zeros((BQ,), dtype=tl.float32)
    b_out = tl.zeros((BQ, BD), dtype=tl.float32)
    last = tl.minimum((tl.program_id(0) + 1) * BQ, length)
    for start in range(0, last, BK):
        i_k = start + tl.arange(0, BK)
        m_k = i_k < length
        keys = (i_h // group) * length + i_k
        b_s = scores_tile(
            b_q, k_ptr + keys * width, i_q, i_k, m_k, real_ptr, width, scale, softcap, BD, PADDED, CAPPED, DOT
        )
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp(b_s - b_new[:, None])
        fade = tl.exp(b_max - b_new)
        b_sum = b_sum * fade + tl.sum(b_p, 1)
        b_v = tl.load(v_ptr + keys[:, None] * width + i_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
        b_out = tl.dot(b_p.to(v_ptr.dtype.element_ty).to(DOT), b_v.to(DOT), b_out * fade[:, None],
                       input_precision="ieee")  # fmt: skip
        b_max = b_new
    some = b_sum > 0.0
    b_out = tl.where(some[:, None], b_out / tl.where(some, b_sum, 1.0)[:, None], 0.0)
    tl.store(lse_ptr + rows, tl.where(some, b_max + tl.log(b_sum), 0.0), mask=m_q)
    p_out = out_ptr + rows[:, None] * width + i_d[None, :]
    tl.store(p_out, b_out, mask=m_q[:, None] & m_d[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def columns_kernel(  # type: ignore[no-untyped-def]  # noqa: ANN201
    q_ptr, k_ptr, real_ptr, rank_ptr, lse_ptr, sums_ptr, peak_ptr,  # noqa: ANN001
    heads, group, length, width, scale, softcap, tau, least,  # noqa: ANN001
    BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    PADDED: tl.constexpr, CAPPED: tl.constexpr, RELATIVE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """c [B·H, length] of BK keys over the real rows, and the highest c / (threshold · max(n, least)) up to any tile.

    n counts the rows before the tile and c those up to its end: what a row inside it reaches is never more.
    """
    i_h = tl.program_id(1).to(tl.int64)
    i_k = tl.program_id(0) * BK + tl.arange(0, BK)
    i_d = tl.arange(0, BD)
    m_k, m_d = i_k < length, i_d < width
    real_ptr += (i_h // heads) * length
    rank_ptr += (i_h // heads) * length
    p_k = k_ptr + ((i_h // group) * length + i_k) * width
    before = i_k
    if PADDED:
        before = tl.load(rank_ptr + i_k, mask=m_k, other=0) - tl.load(real_ptr + i_k, mask=m_k, other=0)
    b_sum = tl.zeros((BK,), dtype=tl.float32)
    b_peak = tl.zeros((BK,), dtype=tl.float32)
    first = tl.program_id(0) * BK // BQ * BQ
    for start in range(first, length, BQ):
        i_q = start + tl.arange(0, BQ)
        m_q = i_q < length
        rows = i_h * length + i_q
        b_q = tl.load(q_ptr + rows[:, None] * width + i_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)
        b_lse = tl.load(lse_ptr + rows, mask=m_q, other=0.0)
        b_s = scores_tile(b_q, p_k, i_q, i_k, m_k, real_ptr, width, scale, softcap, BD, PADDED, CAPPED, DOT)
        b_p = tl.exp(b_s - b_lse[:, None])
        m_r = m_q
        if PADDED:
            m_r = m_q & (tl.load(real_ptr + i_q, mask=m_q, other=0) > 0)
        b_sum += tl.sum(tl.where(m_r[:, None], b_p, 0.0), 0)
        stop = tl.minimum(start + BQ, length)
        seen, sight = start, stop
        if PADDED:
            seen = tl.load(rank_ptr + start - 1, mask=start > 0, other=0)
            sight = tl.maximum(tl.load(rank_ptr + stop - 1), 1)
        number = tl.maximum((seen - before).to(tl.float32), least)
        threshold = tau
        if RELATIVE:
            threshold = tau / sight.to(tl.float32)
        b_peak = tl.maximum(b_peak, b_sum / (threshold * number))
    tl.store(sums_ptr + i_h * length + i_k, b_sum, mask=m_k)
    tl.store(peak_ptr + i_h * length + i_k, b_peak, mask=m_k)


def sweeps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    padding: torch.Tensor | None,
    calibration: Calibration,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """O [B, H, L, d], LSE [B, H, L], c and peak [B, H, K], all in fp32. As many queries as keys."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    batch, heads, length, width = query.shape
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    rows, keys = _TILES[dtype.itemsize]
    depth = max(16, triton.next_power_of_2(width))
    output = torch.empty_like(query, dtype=torch.float32)  # g may be large: no digit is given away before
    lse, sums, peak = query.new_empty((3, batch, heads, length), dtype=torch.float32)
    real = query if padding is None else padding.to(torch.int32).contiguous()
    rank = real if padding is None else padding.cumsum(-1, dtype=torch.int32).contiguous()
    common = (heads, heads // key.shape[1], length, width, scale, softcap or 1.0)
    constants: dict[str, Any] = {"BQ": rows, "BK": keys, "BD": depth, "PADDED": padding is not None,
                                 "CAPPED": softcap is not None, "DOT": _dot(dtype)}  # fmt: skip
    forward_kernel[(triton.cdiv(length, rows), batch * heads)](
        query, key, value, real, output, lse, *common, **constants, **OPTIONS
    )
    least = float(max(calibration.min_queries, 1))
    columns_kernel[(triton.cdiv(length, keys), batch * heads)](
        query, key, real, rank, lse, sums, peak, *common, calibration.tau, least,
        RELATIVE=calibration.relative, **constants, **OPTIONS,
    )  # fmt: skip
    return output, lse, sums, peak


def _dot(dtype: torch.dtype) -> Any:
    """What the products multiply; fp32 in the interpreter, whose bf16 product is garbage."""
    return tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else _NAMES[dtype]


def builds() -> dict[str, dict[str, Any]]:
    """The forms of the kernels that are shipped, by name, as arguments of an ahead-of-time build.

    Heads of 64 and 128 in bf16 and fp16, of 64 in fp32; with padding, softcap and the relative threshold in bf16.
    """
    found = {}
    for name, dtype, depth, full in (
        ("bf16", torch.bfloat16, 64, False), ("bf16", torch.bfloat16, 128, False), ("bf16", torch.bfloat16, 128, True),
        ("fp16", torch.float16, 128, False), ("fp32", torch.float32, 64, False),
    ):  # fmt: skip
        label = f"{name}, {depth}" + (", padding, softcap" if full else "")
        for use, function in (("forward", forward_kernel), ("columns", columns_kernel)):
            found[f"calibrated_attention.{use}[{label}]"] = _build(function, name, dtype, depth, full)
    return found


def _build(function: Any, name: str, dtype: torch.dtype, depth: int, full: bool) -> dict[str, Any]:
    rows, keys = _TILES[dtype.itemsize]
    types = {f"{one}_ptr": f"*{name}" for one in ("q", "k", "v")} | {"out_ptr": "*fp32"}
    types |= {"real_ptr": "*i32", "rank_ptr": "*i32", "lse_ptr": "*fp32", "sums_ptr": "*fp32", "peak_ptr": "*fp32"}
    types |= dict.fromkeys(("scale", "softcap", "tau", "least"), "fp32")
    constants = {"BQ": rows, "BK": keys, "BD": depth, "PADDED": full, "CAPPED": full, "DOT": _NAMES[dtype]}
    constants |= {"RELATIVE": full} if function is columns_kernel else {}
    signature = {one: "constexpr" if one in constants else types.get(one, "i32") for one in function.arg_names}
    sizes = ("length", "width")
    marked = [index for index, (one, kind) in enumerate(signature.items()) if kind[0] == "*" or one in sizes]
    return {
        "function": function,
        "signature": signature,
        "constants": constants,
        "attributes": {(index,): [["tt.divisibility", 16]] for index in marked},
        "options": OPTIONS,
    }
