"""What `linear_cross_entropy` costs, refuses and leaves alone; its numbers are checked beside this file."""

from contextlib import nullcontext

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from regraft.kernels import linear_cross_entropy_chunked as chunked
from regraft.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs, reference
from tests.kernels.test_linear_cross_entropy import ODD, operands, same


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_a_second_backward_pass_needs_the_graph_kept(function):
    states, weight, labels, bias = operands(*ODD)
    loss = function(states, weight, labels, bias=bias).sum() * 0.37
    inputs = (states, weight, bias)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for again, before in zip(torch.autograd.grad(loss, inputs), first, strict=True):
        same(again, before, 1e-6)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_gradient_of_the_gradient_is_refused(function):
    states, weight, labels, _ = operands(*ODD, bias=False)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(function(states, weight, labels).sum(), states, create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_gradients_none_are_computed(monkeypatch, mode):
    states, weight, labels, bias = operands(*ODD)
    if mode is nullcontext:
        states, weight, bias = (item.detach() for item in (states, weight, bias))
    expected = reference(states, weight, labels, bias=bias)
    monkeypatch.setattr(chunked, "_errors", lambda *_: pytest.fail("a gradient is computed"))
    with mode():
        ours = linear_cross_entropy(states, weight, labels, bias=bias)
        log_probs = linear_log_probs(states, weight, labels, bias=bias)
    assert not ours.requires_grad
    same(ours, expected, 1e-6)
    same(-log_probs.sum() / (labels >= 0).sum(), expected, 1e-6)


@pytest.mark.parametrize(
    ("function", "frozen", "times"),
    [
        (linear_cross_entropy, False, 1),
        (linear_cross_entropy, True, 1),
        (linear_log_probs, True, 1),
        (linear_log_probs, False, 2),
    ],
)
def test_how_often_logits_are_computed(monkeypatch, function, frozen, times):
    """Twice only where the gradients wait for the tokens' own factors and the head learns."""
    made = []
    product = chunked._logits
    monkeypatch.setattr(
        chunked, "_logits", lambda *arguments: made.append(product(*arguments).numel()) or arguments[-1]
    )
    states, weight, labels, _ = operands(*ODD, bias=False, ignored=False)
    weight.requires_grad_(not frozen)
    function(states, weight, labels, chunk_tokens=8).sum().backward()
    assert sum(made) == times * 37 * 101


class Live(TorchDispatchMode):
    """The most bytes, at the end of any operation, in tensors that did not exist before."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if torch.is_tensor(item) and item.untyped_storage().data_ptr() not in self.known:
                storage = item.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: entry for key, entry in self.storages.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return result


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
@pytest.mark.parametrize("learns", ["hidden and head", "hidden", "nothing"])
def test_memory(monkeypatch, function, learns):
    """Far less than the logits; a frozen head costs neither a gradient nor a wide copy."""
    tokens, hidden, vocab, chunk, block = 128, 32, 1000, 8, 20
    monkeypatch.setattr(chunked, "WEIGHT_BLOCK_ELEMENTS", block * hidden)
    states, weight, labels, _ = operands(tokens, hidden, vocab, torch.bfloat16, bias=False, ignored=False)
    states.requires_grad_(learns != "nothing")
    weight.requires_grad_(learns == "hidden and head")

    def peak(loss):
        states.grad = weight.grad = None
        with Live(states, weight, labels) as live:
            value = loss(states, weight, labels).sum()
            if value.requires_grad:
                value.backward()
        return live.peak

    gradients = 6 * tokens * hidden * states.requires_grad + 6 * vocab * hidden * weight.requires_grad  # fp32 and bf16
    small = 4 * (3 * block * hidden + 4 * chunk * block + chunk * hidden + 12 * tokens)
    logits = 4 * chunk * vocab if states.requires_grad else 0
    assert peak(reference) >= 4 * tokens * vocab
    assert peak(lambda *operands: function(*operands, chunk_tokens=chunk)) <= gradients + logits + small


def test_operands_without_gradient_get_none():
    states, weight, labels, bias = operands(*ODD)
    states.requires_grad_(False)
    linear_cross_entropy(states, weight, labels, bias=bias).backward()
    assert states.grad is None
    expected = torch.autograd.grad(reference(states, weight, labels, bias=bias), (weight, bias))
    same(weight.grad, expected[0], 1e-6)
    same(bias.grad, expected[1], 1e-6)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_autocast_rounds_the_operands_and_nothing_else(function):
    states, weight, labels, _ = operands(*ODD, bias=False)
    rounded = [item.detach().bfloat16().float().requires_grad_() for item in (states, weight)]
    expected = function(*rounded, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = function(states, weight, labels)
        (ours.sum() * 1.7).backward()
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)
    for leaf, wanted in zip((states, weight), torch.autograd.grad(expected.sum() * 1.7, rounded), strict=True):
        same(leaf.grad, wanted, 1e-6)


def test_strided_operands():
    states, weight, labels, _ = operands(*ODD, bias=False)
    turned = [item.detach().T.contiguous().T.requires_grad_() for item in (states, weight)]
    loss = linear_cross_entropy(*turned, torch.stack((labels, labels), 1)[:, 0])
    expected = linear_cross_entropy(states, weight, labels)
    same(loss, expected, 1e-6)
    wanted = torch.autograd.grad(expected, (states, weight))
    for gradient, other in zip(torch.autograd.grad(loss, turned), wanted, strict=True):
        same(gradient, other, 1e-6)


MISFITS = [
    ((4, 5), (7, 6), (4,), (7,)),
    ((4, 5), (7, 5), (3,), (7,)),
    ((4, 5), (7, 5), (4,), (6,)),
    ((2, 4, 5), (7, 5), (2,), (7,)),
    ((4, 5), (0, 5), (4,), (0,)),
]


@pytest.mark.parametrize(("hidden", "weight", "labels", "bias"), MISFITS)
def test_shapes_that_do_not_fit(hidden, weight, labels, bias):
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(
            torch.zeros(hidden), torch.zeros(weight), torch.zeros(labels, dtype=torch.int64), bias=torch.zeros(bias)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "average"}, "mean, sum or none, not 'average'"),
        ({"softcap": 0.0}, "softcap is a number above 0"),
        ({"chunk_tokens": 0}, "chunk_tokens is 1 or more"),
        ({"implementation": "cuda"}, "auto, torch or triton, not 'cuda'"),
    ],
)
def test_options_that_do_not_fit(options, message):
    states, weight, labels, _ = operands(*ODD)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(states, weight, labels, **options)


def test_dtypes_that_do_not_fit():
    states, weight, labels, _ = operands(*ODD)
    with pytest.raises(ValueError, match=r"labels are int64, not torch\.int32"):
        linear_cross_entropy(states, weight, labels.int())
    with pytest.raises(ValueError, match=r"are floats, not .*uint8"):
        linear_cross_entropy(states, weight.detach().to(torch.uint8), labels)


@pytest.mark.parametrize("label", [101, -1])
def test_label_outside_the_vocabulary(label):
    states, weight, labels, _ = operands(*ODD)
    labels[12] = label
    with pytest.raises(IndexError, match=f"label {label} of token 12 is outside the vocabulary of 101 rows"):
        linear_cross_entropy(states, weight, labels)


def test_triton_that_cannot_run_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    states, weight, labels, _ = operands(*ODD)
    with pytest.raises(RuntimeError, match="on cpu, not on a CUDA device"):
        linear_cross_entropy(states, weight, labels, implementation="triton")
    with pytest.raises(RuntimeError, match="float64"):
        linear_log_probs(states, weight.double(), labels, implementation="triton")


def test_importing_the_torch_path_does_not_import_triton():
    import subprocess
    import sys

    code = "import sys, regraft.kernels.linear_cross_entropy; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
