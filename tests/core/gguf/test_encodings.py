"""Every encoding is dequantised exactly, whole and by rows, and only what was asked for is decoded."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regraft.core.errors import InputError
from regraft.core.gguf.tensors import GgufFile, GgufTensor, Layout
from regraft.core.sources import open_checkpoint
from regraft.core.specs import torch_dtype
from tests.core.gguf.writing import add_tensor, finish, permuted, write_model
from tests.families import tiny

WRITABLE = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
READABLE = [
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ1_S",
    "IQ1_M",
]
ROWS, COLUMNS = 24, 512


def packed_file(tmp_path, name, data, encoding):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "packed.gguf", "llama")
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[encoding])
    return GgufFile(finish(writer))


def random_blocks(encoding, seed=0):
    """Bytes of a matrix [ROWS, COLUMNS] with tame scales: every 16-bit pair that could be a scale stays finite."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[encoding]]
    data = np.random.default_rng(seed).integers(0, 256, (ROWS, COLUMNS // block * size), dtype=np.uint8)
    return data & np.uint8(0xBB)  # clears a bit of every possible half-precision exponent: no infinities, no NaN


@pytest.mark.parametrize("encoding", READABLE)
def test_k_and_i_quants_against_transformers_kernels(encoding, tmp_path):
    import gguf
    from transformers.integrations.gguf.dequant import dequantize

    data = random_blocks(encoding)
    file = packed_file(tmp_path, "w", data, encoding)
    tensor = GgufTensor(file, file.header.tensors["w"], "w")
    theirs = dequantize(torch.from_numpy(data), int(gguf.GGMLQuantizationType[encoding])).reshape(ROWS, COLUMNS)
    ours = tensor.load()
    assert ours.dtype == torch.float32
    assert ours.isfinite().all()
    assert ours.unique().numel() > 8
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("encoding", WRITABLE)
def test_simple_quants_against_the_values_they_stand_for(encoding, tmp_path):
    model = tiny("qwen2")
    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model, encoding))
    steps = {"4": 16, "5": 32, "8": 256}[encoding[1]]
    for name, original in model.state_dict().items():
        loaded = checkpoint.load(name)
        assert checkpoint.specs[name].dtype == "F32"
        if original.ndim == 1:
            assert torch.equal(loaded, original)
            continue
        blocks = original.reshape(-1, 32)
        spread = 2 * blocks.abs().amax(1, keepdim=True) / steps
        assert ((loaded.reshape(-1, 32) - blocks).abs() <= 1.05 * spread).all(), name
        assert not torch.equal(loaded, original)


@pytest.mark.parametrize("encoding", ["F16", "BF16", "F32"])
def test_plain_encodings_keep_dtype_and_bytes(encoding, tmp_path):
    model = tiny("llama")
    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model, encoding))
    for name, original in model.state_dict().items():
        rounded = original.to(torch_dtype(encoding)) if original.ndim > 1 else original
        assert torch.equal(checkpoint.load(name), rounded), name
        raw = checkpoint.raw(name)
        if "q_proj" in name or "k_proj" in name:
            assert raw is None
            continue
        with raw.path.open("rb") as file:
            file.seek(raw.offset)
            assert file.read(raw.nbytes) == rounded.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_packed_and_shifted_tensors_have_no_raw_bytes(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", tiny("gemma2"), "Q8_0"))
    assert all(checkpoint.raw(name) is None for name in checkpoint.tensors)


@pytest.mark.parametrize("head_dim", [0, 8, 24])
@pytest.mark.parametrize("encoding", ["F16", "Q8_0"])
def test_any_range_of_rows_is_the_slice_of_the_whole(encoding, head_dim, tmp_path):
    import gguf

    original = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    stored = permuted(original, 48 // head_dim) if head_dim else original
    writer = gguf.GGUFWriter(tmp_path / "rows.gguf", "llama")
    add_tensor(writer, "first", torch.zeros(1, 32), encoding)
    add_tensor(writer, "w", stored, encoding)
    file = GgufFile(finish(writer))
    tensor = GgufTensor(file, file.header.tensors["w"], "w", Layout(rotary_head_dim=head_dim))
    whole = tensor.load()
    torch.testing.assert_close(whole.float(), original, rtol=0, atol=0.05)
    read = tensor.open()
    for start, stop in [(0, 1), (0, 48), (5, 6), (7, 9), (3, 29), (23, 25), (24, 48), (47, 48)]:
        assert torch.equal(read(start, stop), whole[start:stop]), (start, stop)


def test_a_row_is_read_without_the_rest(tmp_path, monkeypatch):
    from regraft.core.gguf import tensors

    file = packed_file(tmp_path, "w", random_blocks("Q4_K"), "Q4_K")
    read_bytes = []
    read_into = tensors.read_into
    monkeypatch.setattr(
        tensors,
        "read_into",
        lambda fd, buffer, *a, **k: (read_bytes.append(len(buffer)), read_into(fd, buffer, *a, **k)),
    )
    tensor = GgufTensor(file, file.header.tensors["w"], "w")
    tensor.open()(3, 5)
    assert read_bytes == [2 * file.header.tensors["w"].row_bytes]
    assert tensor.row_local


def test_infinite_scales_are_the_files_own_and_raise_no_warning(tmp_path):
    data = np.full((1, 34), 0x7C, dtype=np.uint8)
    data[0, 0] = 0
    file = packed_file(tmp_path, "w", data, "Q8_0")
    assert GgufTensor(file, file.header.tensors["w"], "w").load().isinf().all()


def test_encoding_without_dequantiser_is_named(tmp_path):
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_1]
    file = packed_file(tmp_path, "w", np.zeros((4, size), dtype=np.uint8), "Q8_1")
    with pytest.raises(InputError, match="nothing here dequantises") as caught:
        GgufTensor(file, file.header.tensors["w"], "w")
    assert caught.value.found == "Q8_1"
    assert block == 32
