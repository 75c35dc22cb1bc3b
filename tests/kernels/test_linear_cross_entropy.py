import itertools

import pytest
import torch
from torch.nn import functional as F

from regraft.kernels import linear_cross_entropy_chunked as chunked
from regraft.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ALIGNED, ODD = (64, 32, 128), (37, 19, 101)
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""How far a gradient may lie from the exact one, relative to its norm: one rounding, with room for the sums."""


def operands(tokens, hidden, vocab, dtype=torch.float32, *, bias=True, ignored=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, hidden), (vocab, hidden), (vocab,))
    states, weight, offsets = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    if ignored:
        labels[::5] = -100
    return states, weight, labels, offsets if bias else None


def leaves(*tensors):
    return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]


def exact(states, weight, bias):
    """The same numbers in float64, as leaves of another graph."""
    wide = (None if item is None else item.detach().double().requires_grad_() for item in (states, weight, bias))
    return tuple(wide)


def error(ours, expected):
    ours, expected = ours.detach().double(), expected.detach().double()
    return float((ours - expected).norm() / expected.norm())


def same(ours, expected, tolerance):
    assert ours.shape == expected.shape
    assert error(ours, expected) < tolerance


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut the vocabulary into many pieces, the last one incomplete."""
    monkeypatch.setattr(chunked, "WEIGHT_BLOCK_ELEMENTS", 200)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("bias", "softcap", "scale"), [(False, None, 1.0), (True, None, 1.0), (False, 5.0, 1.0), (True, 3.0, 0.3)]
)
def test_equals_the_plain_form(small_blocks, reduction, bias, softcap, scale):
    for shape, chunk_tokens in itertools.product((ALIGNED, ODD), (1, 7, None)):
        states, weight, labels, offsets = operands(*shape, bias=bias)
        options = {"bias": offsets, "softcap": softcap, "logit_scale": scale, "reduction": reduction}
        plain = reference(states, weight, labels, **options)
        ours = linear_cross_entropy(states, weight, labels, chunk_tokens=chunk_tokens, **options)
        same(ours, plain, 1e-6)
        upstream = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3))
        inputs = leaves(states, weight, offsets)
        expected = torch.autograd.grad(plain, inputs, upstream)
        for gradient, wanted in zip(torch.autograd.grad(ours, inputs, upstream), expected, strict=True):
            same(gradient, wanted, 1e-6)


def test_reference_is_what_models_write():
    """Gemma 2 caps logits / c, Cohere multiplies by a scale; the bias comes before both."""
    states, weight, labels, bias = operands(*ODD)
    logits = (states @ weight.T + bias) * 0.25
    expected = F.cross_entropy(torch.tanh(logits / 30.0) * 30.0, labels)
    same(reference(states, weight, labels, bias=bias, softcap=30.0, logit_scale=0.25), expected, 1e-6)


@pytest.mark.parametrize("frozen", [False, True])
def test_preference_loss_from_log_probs(small_blocks, frozen):
    """DPO's loss weighs tokens by a factor that only the whole batch gives."""
    states, weight, labels, bias = operands(*ALIGNED)
    weight.requires_grad_(not frozen)
    bias.requires_grad_(not frozen)

    def loss(log_probs):
        chosen, rejected = log_probs.view(2, -1).sum(1)
        return -F.logsigmoid(0.01 * (chosen - rejected))

    ours = linear_log_probs(states, weight, labels, bias=bias, chunk_tokens=9)
    plain = F.log_softmax(states @ weight.T + bias, 1).gather(1, labels.clamp_min(0)[:, None])[:, 0] * (labels >= 0)
    same(ours, plain, 1e-6)
    assert (ours[labels < 0] == 0).all()
    inputs = leaves(states, weight, bias)
    assert len(inputs) == (1 if frozen else 3)
    expected = torch.autograd.grad(loss(plain), inputs)
    for gradient, wanted in zip(torch.autograd.grad(loss(ours), inputs), expected, strict=True):
        same(gradient, wanted, 2e-6)  # the factor itself comes from sums of a hundred log-probabilities


@pytest.mark.parametrize(("dtype", "reduction"), list(itertools.product(DTYPES[:2], ("mean", "none"))))
def test_low_precision_is_rounded_once(small_blocks, dtype, reduction):
    states, weight, labels, bias = operands(*ODD, dtype)
    wide = exact(states, weight, bias)
    expected = reference(wide[0], wide[1], labels, bias=wide[2], reduction=reduction)
    ours = linear_cross_entropy(states, weight, labels, bias=bias, reduction=reduction, chunk_tokens=8)
    assert ours.dtype == torch.float32
    same(ours, expected, 1e-6)
    upstream = torch.rand(expected.shape, generator=torch.Generator().manual_seed(3))
    gradients = torch.autograd.grad(ours, (states, weight, bias), upstream)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert gradient.dtype == dtype
        same(gradient, wanted, ROUNDING[dtype])


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations((*DTYPES, torch.float64), 2)))
def test_mixed_dtypes(first, second):
    states, weight, labels, _ = operands(*ODD, bias=False)
    states = states.detach().to(first).requires_grad_()
    weight = weight.detach().to(second).requires_grad_()
    wide = exact(states, weight, None)[:2]
    ours = linear_cross_entropy(states, weight, labels)
    assert ours.dtype == (torch.float64 if torch.float64 in (first, second) else torch.float32)
    expected = torch.autograd.grad(reference(*wide, labels), wide)
    for gradient, wanted, dtype in zip(
        torch.autograd.grad(ours, (states, weight)), expected, (first, second), strict=True
    ):
        assert gradient.dtype == dtype
        wide_sums = ROUNDING[torch.float32] if ours.dtype == torch.float32 else 0.0
        same(gradient, wanted, max(ROUNDING[dtype], wide_sums))


def test_small_gradients_survive_fp16_with_a_loss_scale():
    """A mean over many tokens makes gradients below fp16; the loss scale lifts them before they are rounded."""
    states, weight, labels, _ = operands(2000, 8, 300, torch.float16, bias=False)
    states, weight = (item.detach().mul(0.1).requires_grad_() for item in (states, weight))
    wide = exact(states, weight, None)[:2]
    (linear_cross_entropy(states, weight, labels) * 65536.0).backward()
    expected = torch.autograd.grad(reference(*wide, labels) * 65536.0, wide)
    assert (expected[1].abs() / 65536.0 < 6e-5).float().mean() > 0.2, "no small gradients: the test shows nothing"
    same(states.grad, expected[0], 6e-4)
    same(weight.grad, expected[1], 6e-4)


def test_ignored_tokens_reach_nothing():
    states, weight, labels, bias = operands(*ODD)
    with torch.no_grad():
        states[labels < 0] = float("nan")
    loss = linear_cross_entropy(states, weight, labels, bias=bias)
    gradients = torch.autograd.grad(loss, (states, weight, bias))
    assert all(gradient.isfinite().all() for gradient in (loss, *gradients))
    assert (gradients[0][labels < 0] == 0).all()
    assert (gradients[0][labels >= 0] != 0).any(1).all()


def test_columns_ruled_out_by_an_infinite_bias(small_blocks):
    """Rows that only pad the vocabulary, whole blocks of them."""
    states, weight, labels, bias = operands(*ODD)
    with torch.no_grad():
        bias[:25] = -torch.inf
    labels[(labels >= 0) & (labels < 25)] = 50
    ours, plain = (function(states, weight, labels, bias=bias) for function in (linear_cross_entropy, reference))
    same(ours, plain, 1e-6)
    inputs = (states, weight, bias)
    for gradient, wanted in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs), strict=True):
        same(gradient, wanted, 1e-6)


def test_ignore_index_may_be_a_token():
    states, weight, labels, _ = operands(*ODD, bias=False, ignored=False)
    labels[:10] = 7
    same(
        linear_cross_entropy(states, weight, labels, ignore_index=7),
        reference(states, weight, labels, ignore_index=7),
        1e-6,
    )


@pytest.mark.parametrize(("reduction", "tokens"), list(itertools.product(("mean", "sum", "none"), (6, 0))))
def test_no_token_that_counts(reduction, tokens):
    """As `F.cross_entropy`: the mean is NaN, the sum 0, all gradients 0."""
    states, weight, labels, bias = operands(tokens, 5, 7)
    labels[:] = -100
    ours = linear_cross_entropy(states, weight, labels, bias=bias, reduction=reduction)
    plain = reference(states, weight, labels, bias=bias, reduction=reduction)
    assert torch.equal(ours.nan_to_num(nan=-1.0), plain.nan_to_num(nan=-1.0))
    for gradient in torch.autograd.grad(ours.sum(), (states, weight, bias)):
        assert (gradient == 0).all()


def test_tied_weight():
    """Embedding and head are one parameter; its gradient is the sum of both uses."""
    _, weight, labels, _ = operands(*ODD, ignored=False)
    tokens = labels.roll(1)

    def gradient(loss):
        return torch.autograd.grad(loss(torch.tanh(F.embedding(tokens, weight)), weight, labels), weight)[0]

    same(gradient(linear_cross_entropy), gradient(reference), 1e-6)


def test_accumulation_is_one_batch():
    """Two batches of four sequences, halved, are one batch of eight of the same length."""
    states, weight, labels, bias = operands(8 * 12, 19, 101, ignored=False)
    whole = torch.autograd.grad(linear_cross_entropy(states, weight, labels, bias=bias), (states, weight, bias))
    for half in (slice(0, 48), slice(48, 96)):
        (linear_cross_entropy(states[half], weight, labels[half], bias=bias) / 2).backward()
    for leaf, expected in zip((states, weight, bias), whole, strict=True):
        same(leaf.grad, expected, 1e-6)


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (2.0, 0.7)])
def test_gradcheck(monkeypatch, softcap, scale):
    monkeypatch.setattr(chunked, "WEIGHT_BLOCK_ELEMENTS", 12)
    states, weight, labels, bias = operands(7, 3, 11, torch.float64)
    options = {"softcap": softcap, "logit_scale": scale, "chunk_tokens": 2}

    def summed(hidden, head, offsets):
        return linear_cross_entropy(hidden, head, labels, bias=offsets, **options)

    def each(hidden, head, offsets):
        return linear_log_probs(hidden, head, labels, bias=offsets, **options)

    # the first backward pass has its gradients from the forward pass, the others compute them: not to the last bit
    assert torch.autograd.gradcheck(summed, (states, weight, bias), nondet_tol=1e-13)
    assert torch.autograd.gradcheck(each, (states, weight, bias))
    assert torch.autograd.gradcheck(each, (states, weight.detach(), bias.detach()), nondet_tol=1e-13)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "reduction"), list(itertools.product(DTYPES, ("mean", "none"))))
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_on_a_gpu(dtype, reduction, implementation):
    for shape in (ALIGNED, ODD, (1500, 384, 9001)):
        on_cpu = operands(*shape, dtype)
        states, weight, labels, bias = (item.detach().cuda() for item in on_cpu)
        leaf = [item.requires_grad_() for item in (states, weight, bias)]
        wide = exact(states, weight, bias)
        options = {"softcap": 30.0, "logit_scale": 0.1, "reduction": reduction}
        expected = reference(wide[0], wide[1], labels, bias=wide[2], **options)
        ours = linear_cross_entropy(states, weight, labels, bias=bias, implementation=implementation, **options)
        same(ours, expected, 1e-5)
        upstream = torch.rand_like(expected)
        wanted = torch.autograd.grad(expected, wide, upstream)
        for gradient, other in zip(torch.autograd.grad(ours, leaf, upstream.float()), wanted, strict=True):
            same(gradient, other, max(5e-6, 2 * ROUNDING[dtype]))
