"""The Triton kernels in the interpreter, which must be on before they are imported: they run by themselves."""

import itertools
import math
import os

import pytest
import torch

from regraft.kernels.fourier_logits import fourier_logits
from regraft.kernels.fourier_nll import fourier_nll
from tests.kernels.test_fourier import DTYPES, ROUNDING, compare_logits, compare_nll, operands

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="`nox -s kernels` sets TRITON_INTERPRET=1")

if INTERPRETED:
    import triton
    import triton.language as tl

    from regraft.kernels.fourier_nll_triton import sincos

    @triton.jit
    def angles_kernel(turns_ptr, cos_ptr, sin_ptr, bins, size: tl.constexpr):
        i = tl.arange(0, size)
        cos, sin = sincos(tl.load(turns_ptr + i), bins)
        tl.store(cos_ptr + i, cos)
        tl.store(sin_ptr + i, sin)


def test_an_older_triton_is_not_used(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    coefficients, labels = operands(4, 3, 10, torch.float32)
    for call in (lambda how: fourier_logits(coefficients, 10, implementation=how),
                 lambda how: fourier_nll(coefficients, labels, 10, implementation=how)):  # fmt: skip
        with pytest.raises(RuntimeError, match=r"cannot run: Triton 3\.2\.0 is older than 3\.3"):
            call("triton")
        assert torch.equal(call("auto"), call("torch"))


SHAPES = ((19, 13, 50), (1, 1, 3), (17, 140, 150))


@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, SHAPES)))
def test_forward_and_backward(dtype, shape):
    coefficients, labels = operands(*shape, dtype, ignored=shape[0] > 1)
    common = {"tolerance": 2e-6, "gradient_tolerance": 2 * ROUNDING[dtype], "implementation": "triton", "floor": 1e-2}
    for reduction in ("mean", "none"):
        compare_nll(coefficients, labels, shape[2], reduction=reduction, **common)
    gate = torch.randn(shape[0]).to(dtype).requires_grad_()
    compare_logits(coefficients, None if shape[0] == 1 else gate, shape[2], **common)


def test_angles_stay_exact_at_high_frequencies():
    """Frequency 550 at the edge of 4096 bins turns 275 times: the series see the rest of it."""
    turns = torch.randint(-550 * 4096, 550 * 4096, (1024,), generator=torch.Generator().manual_seed(0)).int()
    turns[:9] = torch.arange(-4, 5) * 1024
    cos, sin = torch.empty(1024), torch.empty(1024)
    angles_kernel[(1,)](turns, cos, sin, 4096, size=1024)
    angles = turns.double() * (math.pi / 4096)
    assert (cos.double() - angles.cos()).abs().max() < 2e-7
    assert (sin.double() - angles.sin()).abs().max() < 2e-7


def test_no_direction_and_strided_operands():
    coefficients, labels = operands(6, 5, 12, ignored=False)
    coefficients = coefficients.detach()
    coefficients[2] = 0
    turned = coefficients.T.contiguous().T.requires_grad_()
    loss = fourier_nll(turned, labels, 12, implementation="triton", reduction="none")
    assert torch.allclose(loss, fourier_nll(turned, labels, 12, reduction="none"), atol=1e-6)
    assert loss[2].item() == pytest.approx(math.log(12))
    wide = torch.zeros(6, 30)
    fourier_logits(turned.detach(), 12, implementation="triton", out=wide[:, 9:21])
    assert torch.allclose(wide[:, 9:21], fourier_logits(turned.detach(), 12), atol=1e-4)
    assert (wide[:, 21:] == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), turned)
    assert (gradient[2] == 0).all()
