"""Rotary position embedding fused with a factor per position, such as the entropy-aware scale of queries.

    y = t · (x ⊙ cos + rot(x) ⊙ sin),  rot([x1, x2]) = [-x2, x1]        on the first R of D dimensions
    y = t · x                                                           on the rest
    dx = t · (dy ⊙ cos + rotᵀ(dy ⊙ sin)),  rotᵀ([y1, y2]) = [y2, -y1]

x is read once and y written once, in fp32 between (fp64 for fp64), rounded once; apart, rotation and scale are
two passes and two roundings. cos, sin and t learn nothing.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any, Literal

import torch

Implementation = Literal["auto", "torch", "triton"]

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """The specification of `rope_scale`."""
    return _rotated(x, cos, sin, scale, turned=False)


def rope_scale(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: torch.Tensor | None = None,
    *,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Rotated and scaled queries or keys, in the dtype of `x`; differentiable in `x`.

    Shapes: B batch, H heads, L positions, D width of a head, R rotary dimensions.

    Args:
        x: [B, H, L, D].
        cos, sin: [B or 1, L, R], R even and at most D.
        scale: t [B or 1, L]; None is 1.
        implementation: `auto` takes Triton for CUDA tensors that its kernel supports and torch elsewhere.

    Raises:
        ValueError: shapes do not fit, or cos, sin or scale require a gradient.
        RuntimeError: `triton` is asked for where it cannot run.
    """
    _check(x, cos, sin, scale)
    return _Rotation.apply(x, cos, sin, scale, _chosen(implementation, x))  # type: ignore[no-any-return, no-untyped-call]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: torch.Tensor | None, implementation: str
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin, scale)
        ctx.implementation = implementation
        return _run(x, cos, sin, scale, implementation, turned=False)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin, scale = ctx.saved_tensors
        return _run(upstream, cos, sin, scale, ctx.implementation, turned=True), None, None, None, None


def _run(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    scale: torch.Tensor | None,
    implementation: str,
    *,
    turned: bool,
) -> torch.Tensor:
    if implementation == "triton":
        from regraft.kernels import rope_scale_triton as fused

        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            return fused.launch(x, cos, sin, scale, turned=turned)
    return _rotated(x, cos, sin, scale, turned=turned)


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: torch.Tensor | None, *, turned: bool
) -> torch.Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    rotary, half = cos.shape[-1], cos.shape[-1] // 2
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    first, second, rest = torch.tensor_split(x.to(wide), (half, rotary), dim=-1)
    (c1, c2), (s1, s2) = cos.chunk(2, -1), sin.chunk(2, -1)
    if turned:
        parts = [first * c1 + second * s2, second * c2 - first * s1, rest]
    else:
        parts = [first * c1 - second * s1, second * c2 + first * s2, rest]
    whole = torch.cat(parts, dim=-1)
    return (whole if scale is None else whole * scale.to(wide)[:, None, :, None]).to(x.dtype)


def _chosen(implementation: Implementation, x: torch.Tensor) -> str:
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(f"implementation is auto, torch or triton, not {implementation!r}")
    fault = _triton_fault(x)
    if implementation == "triton" and fault:
        raise RuntimeError(f"the Triton implementation of rope_scale cannot run: {fault}")
    if implementation == "auto":
        return "torch" if fault or not x.is_cuda else "triton"
    return implementation


def _triton_fault(x: torch.Tensor) -> str:
    if x.dtype not in _TRITON_DTYPES:
        return f"its kernel does not take {x.dtype}"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensor is on {x.device}, not on a CUDA device"
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: torch.Tensor | None) -> None:
    shapes = [tuple(one.shape) for one in (x, cos, sin) if one is not None]
    fits = x.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape and cos.shape[1] == x.shape[2]
    fits = fits and cos.shape[0] in (1, x.shape[0]) and cos.shape[2] % 2 == 0 and cos.shape[2] <= x.shape[3]
    if not fits:
        raise ValueError(f"shapes of x, cos and sin do not fit [B, H, L, D], [B or 1, L, R], R even: {shapes}")
    if scale is not None and (scale.ndim != 2 or scale.shape[1] != x.shape[2] or scale.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"scale is [B or 1, L], not {tuple(scale.shape)}")
    if any(one is not None and one.requires_grad for one in (cos, sin, scale)):
        raise ValueError("cos, sin and scale have no gradients here: detach them")
