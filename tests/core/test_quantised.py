"""Weights in the parts that bitsandbytes stores: codes and scales with its bits, piece by piece, in bounded memory."""

import pytest

from regraft.core.buffers import CHUNK_BYTES
from regraft.core.fourbit import NF4
from regraft.core.quantised import int8_parts, nf4_parts
from regraft.core.tensors import MemoryTensor
from regraft.kernels.four_bit import block_scales, decode, encode, pair_table
from tests.core.quantising import METHODS, Opaque

pytestmark = [
    # torch's own compiler, imported by bitsandbytes, still uses what torch deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def matrix(rows: int, columns: int, dtype: str = "float32"):
    """Random values, with a block of zeros, a tiny and a huge one."""
    import torch

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    flat = weight.view(-1)
    flat[: min(64, len(flat))] = 0
    flat[128:192] *= 1e-30
    flat[192:256] *= 1e3
    return weight.to(getattr(torch, dtype))


SHAPES = [(1, 1), (7, 37), (33, 100), (5, 64), (1, 130), (600, 300), (3, 140_001), (40, 5504)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_equals_bitsandbytes_piece_by_piece(shape, dtype):
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = matrix(*shape, dtype)
    expected, state = quantize_4bit(weight, quant_type="nf4")
    codes, scales, table, text = nf4_parts(MemoryTensor("w", weight))
    assert torch.equal(codes.load(), expected)
    assert torch.equal(scales.load(), state.absmax)
    packed = state.as_dict(packed=True)
    assert torch.equal(table.load(), packed["quant_map"])
    assert torch.equal(text.load(), packed["quant_state.bitsandbytes__nf4"])
    for part, whole in ((codes, expected), (scales, state.absmax)):
        step, read = max(1, part.spec.rows // 3), part.open()
        pieces = [read(start, min(start + step, part.spec.rows)) for start in range(0, part.spec.rows, step)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_equals_bitsandbytes_row_by_row(shape, dtype):
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = matrix(*shape, dtype)
    weight[0] = 0.25
    expected, scale, _ = int8_vectorwise_quant(weight.half())
    codes, scales, form = int8_parts(MemoryTensor("m.weight", weight))
    assert torch.equal(codes.load(), expected)
    assert torch.equal(scales.load(), scale)
    assert (scales.spec.name, form.spec.name, form.load().item()) == ("m.SCB", "m.weight_format", 0)
    assert torch.equal(codes.open()(shape[0] // 2, shape[0]), expected[shape[0] // 2 :])


def test_a_row_of_zeros_has_codes_of_zero():
    import torch

    codes, scales, _ = int8_parts(MemoryTensor("m.weight", torch.zeros(2, 8)))
    assert not codes.load().any()
    assert not scales.load().any()


@pytest.mark.parametrize("parts", [nf4_parts, int8_parts], ids=METHODS)
def test_a_weight_that_can_only_be_had_whole_is_computed_once_a_part(parts):
    import torch

    weight = matrix(700, 300)
    whole = Opaque(MemoryTensor("m.weight", weight), row_local=False)
    computed, direct = parts(whole)[:2], parts(MemoryTensor("m.weight", weight))[:2]
    for part, expected in zip(computed, direct, strict=True):
        assert not part.row_local
        assert torch.equal(part.load(), expected.load())
    assert whole.computed == 2
    assert computed[0].held_bytes > 2 * whole.spec.nbytes


def test_memory_held_beside_the_rows_is_small():
    import torch

    big = MemoryTensor("w", torch.empty(1, dtype=torch.bfloat16).expand(4096, 14336))
    codes, scales = nf4_parts(Opaque(big))[:2]
    assert max(codes.held_bytes, scales.held_bytes) <= 2 * CHUNK_BYTES


def test_codes_and_scales_survive_the_round_trip():
    """Every code of every byte, in blocks that hold the extremes."""
    import torch

    values = torch.tensor(NF4).repeat(8)
    scales = block_scales(values, 64)
    codes = encode(values, scales, 64, NF4)
    assert codes.tolist() == [(2 * pair % 16) << 4 | (2 * pair % 16 + 1) for pair in range(64)]
    assert torch.equal(decode(codes, scales, pair_table(NF4), 64, 128), values)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [nf4_parts, int8_parts], ids=METHODS)
def test_the_bytes_do_not_depend_on_the_device(parts):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for part in parts(MemoryTensor("m.weight", matrix(600, 320, "bfloat16"))):
        assert torch.equal(part.load("cuda").cpu(), part.load("cpu")), part.spec.name
