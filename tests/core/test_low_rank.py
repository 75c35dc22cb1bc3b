import pytest
import torch

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.low_rank import LowRankDelta, Transposed, realised
from regraft.core.operations import ComputedTensor
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.patch_folder import load_patch, save_patch
from regraft.core.tensors import MemoryTensor, row_chunks
from regraft.kernels.lora_merge import reference


def computed(dtype=torch.bfloat16, rows=48, cols=80, rank=4, scale=0.6):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, cols, generator=generator).half()
    operation = LowRankDelta("w", MemoryTensor("left", left), MemoryTensor("right", right), scale)
    base = MemoryTensor("w", weight)
    return ComputedTensor(base.spec, operation, (base,)), reference(weight, left, right, scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_is_the_reference_with_factors_in_fp32(dtype):
    tensor, expected = computed(dtype)
    assert torch.equal(tensor.load(), expected)


@pytest.mark.parametrize("chunk_bytes", [1, 160, 1000, 1 << 20])
def test_same_bits_in_any_chunks(chunk_bytes):
    tensor, expected = computed()
    read = tensor.open()
    parts = [read(start, stop) for start, stop in row_chunks(tensor.spec, chunk_bytes)]
    assert torch.equal(torch.cat(parts), expected)


def test_a_delta_of_zero_leaves_every_bit():
    base = MemoryTensor("w", torch.tensor([[-0.0, 1.0], [0.0, -2.0]]))
    left, right = MemoryTensor("left", torch.zeros(2, 1)), MemoryTensor("right", torch.ones(1, 2))
    after = ComputedTensor(base.spec, LowRankDelta("w", left, right, 1.0), (base,)).load()
    assert torch.equal(after.signbit(), base.load().signbit())


def test_is_row_local_and_counts_its_factors():
    tensor, _ = computed(rows=48, cols=80, rank=4)
    assert tensor.row_local
    assert tensor.raw is None
    assert tensor.held_bytes == 2 * (48 * 4 * 4 + 4 * 80 * 2) + 48 * 80 * 2


def test_steps_stack():
    first, _ = computed()
    second = LowRankDelta("w", first.operation.left, first.operation.right, -1.5)
    stacked = ComputedTensor(first.spec, second, (first,))
    left, right = first.operation.left.load(), first.operation.right.load()
    assert torch.equal(stacked.load(), reference(first.load(), left, right, -1.5))


def test_is_saved_by_its_formula(tmp_path):
    tensor, expected = computed()
    below = Checkpoint("base", {"w": tensor.sources[0]}, {"config.json": FileRef(data=b"{}")})
    patch = Patch(edits={"w": Edit(tensor.spec, tensor.operation)})
    save_patch(patch, below, overlay(below, patch, by="test"), tmp_path / "p.regraft")
    loaded, reads = load_patch(tmp_path / "p.regraft")
    operation = loaded.edits["w"].operation
    assert isinstance(operation, LowRankDelta)
    assert (operation.inputs, operation.scale) == (("w",), 0.6)
    assert reads == {"w": tensor.spec}
    assert torch.equal(overlay(below, loaded, by="again").load("w"), expected)
    stored = (tmp_path / "p.regraft" / "tensors.safetensors").stat().st_size
    assert stored < 2 * (48 * 4 * 4 + 4 * 80 * 2)


def test_transposed():
    matrix = torch.arange(12.0).view(3, 4)
    turned = Transposed(MemoryTensor("m", matrix))
    assert turned.spec.shape == (4, 3)
    assert not turned.row_local
    assert torch.equal(turned.load(), matrix.T)
    assert torch.equal(turned.open()(1, 3), matrix.T[1:3])


def test_realised_counts_what_rounding_loses():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(300, 700, generator=generator)
    left, right = torch.randn(300, 4, generator=generator), torch.randn(4, 700, generator=generator)
    assert realised(weight, left, right, 1.0) < 1e-6
    tiny = realised(weight.bfloat16(), left, right, 1e-7)
    assert tiny == pytest.approx(1.0, abs=0.05), "a delta far below half a unit in the last place is lost"
    medium, large = realised(weight.bfloat16(), left, right, 1e-3), realised(weight.bfloat16(), left, right, 1.0)
    assert large < 0.01 < medium < tiny
    assert realised(weight, torch.zeros_like(left), right, 1.0) == 0.0


def test_realised_is_its_definition():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(20, 30, generator=generator).bfloat16()
    left, right = torch.randn(20, 2, generator=generator), torch.randn(2, 30, generator=generator)
    delta = 0.01 * (left.double() @ right.double())
    lost = reference(weight, left, right, 0.01).double() - weight.double() - delta
    assert realised(weight, left, right, 0.01) == pytest.approx(float(lost.norm() / delta.norm()), rel=1e-9)
