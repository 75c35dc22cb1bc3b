"""The Triton kernel in the interpreter, which must be on before the kernel is imported: they run by themselves."""

import itertools
import os

import pytest
import torch

from regraft.kernels.rope_scale import rope_scale
from tests.kernels.test_rope_scale import SHAPES, operands

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="`nox -s kernels` sets TRITON_INTERPRET=1")


@pytest.mark.parametrize(
    ("shape", "dtype"), list(itertools.product(SHAPES, (torch.float32, torch.float16, torch.bfloat16)))
)
def test_forward_and_backward_are_those_of_torch_to_the_bit(shape, dtype):
    for batched in (False, True):
        x, cos, sin, scale = operands(shape, dtype, batched=batched)
        cos, sin = cos.float(), sin.float()
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        for factor in (None, scale.float()):
            found = []
            for implementation in ("triton", "torch"):
                leaf = x.mT.contiguous().mT.requires_grad_()
                output = rope_scale(leaf, cos, sin, factor, implementation=implementation)
                found.append((output, torch.autograd.grad(output, leaf, upstream)[0]))
            for ours, theirs in zip(*found, strict=True):
                assert torch.equal(ours, theirs)
