"""`fourier_nll` and `fourier_logits`, in float64 and in what is trained in; shared with the interpreted kernels."""

import itertools

import pytest
import torch

from regraft.kernels import fourier_logits as logits_module
from regraft.kernels import fourier_nll as nll_module
from regraft.kernels.fourier_logits import amplitudes, fourier_logits
from regraft.kernels.fourier_nll import fourier_nll

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SHAPES = ((37, 13, 50), (64, 32, 128), (5, 1, 1), (3, 551, 4096))
"""Rows, frequencies + 1, bins: odd, aligned, the constant density of one bin, and the largest of the paper."""


def operands(rows, count, bins, dtype=torch.float32, *, ignored=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.randn(rows, 2 * count, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, bins, (rows,), generator=generator)
    if ignored:
        labels[::5] = -100
    return coefficients, labels


def error(ours, expected):
    ours, expected = ours.detach().double(), expected.detach().double()
    return float((ours - expected).norm() / expected.norm().clamp_min(1e-30))


def compare_nll(coefficients, labels, bins, *, tolerance, gradient_tolerance, **options):
    """Loss and gradient against the specification in float64."""
    exact = coefficients.detach().double().requires_grad_()
    floor, reduction = options.get("floor", 0.0), options.get("reduction", "mean")
    ours = fourier_nll(coefficients, labels, bins, **options)
    expected = nll_module.reference(exact, labels, bins, floor=floor, reduction=reduction)
    assert ours.dtype == torch.promote_types(coefficients.dtype, torch.float32)
    assert error(ours, expected) < tolerance
    upstream = torch.rand(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.1
    (gradient,) = torch.autograd.grad(ours, coefficients, upstream.to(ours.dtype))
    (wanted,) = torch.autograd.grad(expected, exact, upstream)
    assert gradient.dtype == coefficients.dtype
    assert gradient.isfinite().all()
    assert (gradient.double() - wanted).norm() < gradient_tolerance * max(wanted.norm(), 1e-2)
    assert (gradient[labels < 0] == 0).all()


def compare_logits(coefficients, gate, bins, *, tolerance, gradient_tolerance, **options):
    """Logits, the coefficients' gradient and the gate's against the specification in float64."""
    leaves = [item for item in (coefficients, gate) if item is not None]
    exact = [item.detach().double().requires_grad_() for item in leaves]
    ours = fourier_logits(coefficients, bins, gate=gate, **options)
    expected = logits_module.reference(
        exact[0], bins, floor=options.get("floor", 0.0), gate=exact[1] if gate is not None else None
    )
    assert error(ours.exp(), expected.exp()) < tolerance
    noise = torch.rand(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = torch.softmax(expected.detach(), 1) * noise  # bins without mass count little, as in a cross-entropy
    gradients = torch.autograd.grad(ours, leaves, weights.to(ours.dtype))
    for gradient, wanted, leaf in zip(gradients, torch.autograd.grad(expected, exact, weights), leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert (gradient.double() - wanted).norm() < gradient_tolerance * max(wanted.norm(), 1e-2)


@pytest.mark.parametrize(("shape", "floor"), list(itertools.product(SHAPES, (0.0, 5e-4))))
def test_one_bin_is_the_dense_form(shape, floor):
    rows, _, bins = shape
    coefficients, labels = operands(*shape, torch.float64, ignored=rows > 1)
    for reduction in ("mean", "sum", "none"):
        compare_nll(coefficients, labels, bins, tolerance=1e-13, gradient_tolerance=1e-10, floor=floor,
                    reduction=reduction)  # fmt: skip
    everything = fourier_logits(coefficients, bins, floor=floor)
    assert (everything.exp().sum(1) - 1).abs().max() < 1e-12  # the normalisation is exact, though nothing normalises
    chosen = -everything.gather(1, labels.clamp_min(0)[:, None])[:, 0] * (labels >= 0)
    ours = fourier_nll(coefficients, labels, bins, floor=floor, reduction="none")
    assert torch.allclose(ours, chosen, rtol=1e-10, atol=1e-15)
    gate = torch.randn(rows, dtype=torch.float64, requires_grad=True)
    compare_logits(coefficients, gate, bins, tolerance=1e-12, gradient_tolerance=1e-10, floor=floor)


@pytest.mark.parametrize(("dtype", "shape"), list(itertools.product(DTYPES, SHAPES[:2])))
def test_low_precision_is_rounded_once(dtype, shape):
    coefficients, labels = operands(*shape, dtype)
    compare_nll(coefficients, labels, shape[2], tolerance=1e-6, gradient_tolerance=ROUNDING[dtype], floor=1e-3)
    gate = torch.randn(shape[0]).to(dtype).requires_grad_()
    compare_logits(coefficients, gate, shape[2], tolerance=2e-6, gradient_tolerance=ROUNDING[dtype], floor=1e-3)


def test_gradcheck():
    coefficients, labels = operands(6, 4, 9, torch.float64)
    gate = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: fourier_nll(u, labels, 9, floor=1e-3), coefficients)
    assert torch.autograd.gradcheck(lambda u, g: fourier_logits(u, 9, floor=1e-3, gate=g), (coefficients, gate))


def test_the_fft_is_the_direct_sum():
    coefficients, _ = operands(7, 12, 50, torch.float64)
    real, imaginary = coefficients.detach().chunk(2, 1)
    centres = -1 + (2 * torch.arange(50, dtype=torch.float64) + 1) / 50
    angles = torch.pi * torch.outer(torch.arange(12, dtype=torch.float64), centres)
    direct = torch.complex(real, imaginary) @ torch.complex(angles.cos(), angles.sin())
    assert (amplitudes(coefficients.detach(), 50) - direct).abs().max() < 1e-13


def test_no_direction_is_uniform():
    """Coefficients of zero, and those so small that their squares vanish: 1/m, and no gradient instead of NaN."""
    coefficients = torch.zeros(3, 8)
    coefficients[1] = 1e-30
    coefficients.requires_grad_()
    loss = fourier_nll(coefficients, torch.tensor([0, 4, 9]), 10)
    assert torch.allclose(loss.exp(), torch.tensor(10.0))
    (gradient,) = torch.autograd.grad(loss + fourier_logits(coefficients, 10).sum(), coefficients)
    assert (gradient == 0).all()


def test_small_coefficients_keep_their_shape():
    """The reference code's initial ones, 1e-3 to 1e-5, underflow when they are squared in fp16."""
    coefficients, _ = operands(9, 7, 20, torch.float64)
    small = (coefficients.detach() * 1e-5).half()
    shape = fourier_logits(small.double(), 20)
    assert torch.allclose(fourier_logits(small, 20).double(), shape, atol=1e-5)


def test_result_goes_into_wider_logits():
    coefficients, _ = operands(6, 5, 16)
    wide = torch.full((6, 40), -7.0)
    gate = torch.randn(6)
    fourier_logits(coefficients.detach(), 16, gate=gate, out=wide[:, 10:26])
    assert torch.equal(wide[:, 10:26], fourier_logits(coefficients.detach(), 16, gate=gate))
    assert (wide[:, :10] == -7).all()
    assert (wide[:, 26:] == -7).all()


def test_nothing_counts():
    coefficients, labels = operands(4, 3, 8)
    labels[:] = -100
    assert fourier_nll(coefficients, labels, 8).isnan()
    loss = fourier_nll(coefficients, labels, 8, reduction="sum")
    assert loss == 0
    assert (torch.autograd.grad(fourier_nll(coefficients, labels, 8), coefficients)[0] == 0).all()


def test_memory_is_that_of_the_coefficients():
    """Nothing of rows x bins in the loss, nothing of rows x bins x frequencies in the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for item in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(item, torch.Tensor):
                    self.numbers = max(self.numbers, item.untyped_storage().nbytes() // 4)
            return result

    coefficients, labels = operands(64, 32, 4096, ignored=False)
    with Largest() as one:
        fourier_nll(coefficients, labels, 4096).backward()
    assert one.numbers <= max(2 * 64 * 32, 2 * 2 * 4096)  # places of 8 bytes; the table, made in float64
    with Largest() as every:
        fourier_logits(coefficients, 4096).sum().backward()
    assert every.numbers <= 4 * 64 * 4096


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"bins": 12}, ValueError, "12 frequencies need more than 12 bins"),
        ({"bins": 1 << 27}, ValueError, "frequencies times bins"),
        ({"floor": -1.0}, ValueError, "floor is a mass"),
        ({"floor": float("nan")}, ValueError, "floor is a mass"),
        ({"coefficients": torch.ones(4, 7)}, ValueError, "2 \\* \\(frequencies \\+ 1\\)"),
        ({"coefficients": torch.ones(4, 26, dtype=torch.int64)}, ValueError, "are floats"),
        ({"labels": torch.tensor([0, 1, 50, 2])}, IndexError, "label 50 of row 2 is none of the 50 bins"),
        ({"labels": torch.tensor([0, -3, 1, 2])}, IndexError, "label -3 of row 1"),
        ({"labels": torch.tensor([0, 1])}, ValueError, "one a row"),
        ({"reduction": "max"}, ValueError, "reduction is"),
        ({"implementation": "cuda"}, ValueError, "implementation is"),
        ({"implementation": "triton", "coefficients": torch.ones(4, 26).double()}, RuntimeError, "do not take"),
    ],
)
def test_refuses(change, kind, words):
    options = {"coefficients": torch.ones(4, 26), "labels": torch.zeros(4, dtype=torch.int64), "bins": 50, **change}
    with pytest.raises(kind, match=words):
        fourier_nll(**options)


def test_refuses_what_only_logits_take():
    coefficients, _ = operands(4, 5, 16)
    with pytest.raises(ValueError, match="one number a row"):
        fourier_logits(coefficients, 16, gate=torch.zeros(3))
    with pytest.raises(ValueError, match="contiguous rows"):
        fourier_logits(coefficients.detach(), 16, out=torch.empty(16, 4).T)
    with pytest.raises(RuntimeError, match="no gradient is asked"):
        fourier_logits(coefficients, 16, out=torch.empty(4, 16))
    for result in (fourier_logits(coefficients, 16).sum(), fourier_nll(coefficients, torch.zeros(4).long(), 16)):
        with pytest.raises(RuntimeError, match="first derivative only"):
            torch.autograd.grad(result, coefficients, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    for shape in (*SHAPES[:2], (300, 551, 4096)):
        coefficients, labels = operands(*shape, dtype)
        coefficients, labels = coefficients.detach().cuda().requires_grad_(), labels.cuda()
        gate = torch.randn(shape[0]).to(dtype).cuda().requires_grad_()
        options = {"floor": 1e-3, "implementation": "triton"}
        compare_nll(coefficients, labels, shape[2], tolerance=1e-5, gradient_tolerance=2 * ROUNDING[dtype], **options)
        compare_logits(coefficients, gate, shape[2], tolerance=1e-5, gradient_tolerance=2 * ROUNDING[dtype], **options)
