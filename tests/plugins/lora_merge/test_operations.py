"""The edits by themselves: chunks, saved patches, plans."""

import pytest
import torch

from regraft.core.low_rank import Transposed
from regraft.core.operations import ComputedTensor
from regraft.core.patch import overlay
from regraft.core.patch_folder import load_patch, save_patch
from regraft.core.sources.folder import open_folder
from regraft.core.tensors import MemoryTensor, row_chunks
from regraft.plugins.lora_merge import LoraMerge
from regraft.plugins.lora_merge.math import with_magnitude
from regraft.plugins.lora_merge.operations import AddScaled, MagnitudeDelta, Rebased, StackedDelta, Window
from regraft.plugins.lora_merge.params import LoraMergeParams
from tests.families import save_tiny
from tests.plugins.lora_merge.adapters import make_adapter, tensors_of


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_chunks(tensor, chunk_bytes):
    read = tensor.open()
    return torch.cat([read(start, stop) for start, stop in row_chunks(tensor.spec, chunk_bytes)])


def dora(by_column, dtype=torch.bfloat16):
    weight, left, right = random(40, 56).to(dtype), random(40, 3, seed=1), random(3, 56, seed=2)
    magnitude = 1 + random(56 if by_column else 40, seed=3).abs()
    lazy = [MemoryTensor(name, tensor) for name, tensor in (("l", left), ("r", right), ("m", magnitude))]
    base = MemoryTensor("w", weight)
    operation = MagnitudeDelta("w", *lazy, 0.4, by_column=by_column)
    return (
        ComputedTensor(base.spec, operation, (base,)),
        weight.double() + 0.4 * left.double() @ right.double(),
        magnitude,
    )


@pytest.mark.parametrize("by_column", [False, True])
def test_every_output_has_the_length_of_its_magnitude(by_column):
    tensor, total, magnitude = dora(by_column, torch.float32)
    lengths = tensor.load().double().norm(dim=0 if by_column else 1)
    assert torch.allclose(lengths, magnitude.double(), rtol=1e-5)
    direction = total / total.norm(dim=0 if by_column else 1, keepdim=True)
    expected = direction * (magnitude if by_column else magnitude[:, None]).double()
    assert torch.allclose(tensor.load().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 300, 1000])
def test_dora_in_any_chunks(by_column, chunk_bytes):
    tensor, _, _ = dora(by_column)
    assert tensor.row_local is not by_column
    assert torch.equal(in_chunks(tensor, chunk_bytes), tensor.load())


def test_magnitudes_of_the_merged_weight_change_nothing():
    total = random(6, 9)
    lengths = total.norm(dim=1)
    assert torch.allclose(with_magnitude(total.clone(), lengths, by_column=False), total, rtol=1e-6)


def test_bias():
    bias = MemoryTensor("b", random(7).bfloat16())
    tensor = ComputedTensor(bias.spec, AddScaled("b", MemoryTensor("v", random(7, seed=1)), 0.5), (bias,))
    expected = (bias.load().float() + random(7, seed=1) * 0.5).bfloat16()
    assert torch.equal(tensor.load(), expected)
    assert torch.equal(in_chunks(tensor, 1), expected)


def test_stacked_experts():
    """peft lays the factors out for `einsum("o r e, e r i -> e o i")`."""
    experts, rank, rows, cols = 3, 2, 5, 7
    left, right = random(rows, rank * experts), random(experts * rank, cols, seed=1)
    base = MemoryTensor("w", random(experts, rows, cols, seed=2))
    operation = StackedDelta("w", MemoryTensor("l", left), MemoryTensor("r", right), 0.5, experts)
    delta = torch.einsum("o r e, e r i -> e o i", left.view(rows, rank, experts), right.view(experts, rank, cols))
    tensor = ComputedTensor(base.spec, operation, (base,))
    assert torch.allclose(tensor.load(), base.load() + 0.5 * delta, atol=1e-6)
    assert torch.equal(in_chunks(tensor, 1), tensor.load())


def test_window():
    matrix = MemoryTensor("m", random(6, 8))
    window = Window(matrix, 2, 5, column=1, step=3)
    assert window.spec.shape == (3, 3)
    assert torch.equal(window.load(), random(6, 8)[2:5, 1::3])
    assert torch.equal(window.open()(1, 2), random(6, 8)[3:4, 1::3])


def test_rebased_reads_what_the_adapter_brings():
    brought, other = MemoryTensor("w", random(6)), MemoryTensor("w", random(6, seed=1))
    operation = Rebased(AddScaled("w", MemoryTensor("v", random(6, seed=2)), 2.0), brought)
    assert not operation.inputs
    assert torch.equal(ComputedTensor(other.spec, operation, ()).load(), random(6) + 2 * random(6, seed=2))


def test_transposed_factors_of_an_embedding_are_counted():
    turned = Transposed(MemoryTensor("a", random(4, 100)))
    assert turned.held_bytes == 3 * 4 * 100 * 4


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
        ("llama-tied", {"target_modules": ["lm_head"], "use_dora": True}),
        ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all"}),
        ("mixtral", {"target_modules": "all-linear"}),
    ],
)
def test_a_saved_patch_gives_the_same_bytes(family, config, tmp_path):
    base = save_tiny(family, tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    below, params = open_folder(base, label="base"), LoraMergeParams(adapter=adapter)
    patch = LoraMerge().patch(below, params)
    assert LoraMerge().plan(below, params).deviations(patch) == []
    above = overlay(below, patch, by="lora-merge")
    save_patch(patch, below, above, tmp_path / "p.regraft")
    again = overlay(below, load_patch(tmp_path / "p.regraft")[0], by="patch")
    expected = tensors_of(above)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(again).items())
    assert again.config == above.config


def test_a_lora_patch_is_as_small_as_its_adapter(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    below = open_folder(base, label="base")
    patch = LoraMerge().patch(below, LoraMergeParams(adapter=adapter))
    save_patch(patch, below, overlay(below, patch, by="lora-merge"), tmp_path / "p.regraft")
    files = (tmp_path / "p.regraft" / "tensors.safetensors", adapter / "adapter_model.safetensors")
    sizes = [path.stat().st_size for path in files]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
