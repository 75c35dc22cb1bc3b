"""Output quantisation: the bytes that transformers writes, planned from headers, reloaded by stock classes."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.core.buffers import CHUNK_BYTES
from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import TransformationError, Unsupported
from regraft.core.fourbit import NF4
from regraft.core.layout import lay_out
from regraft.core.patch import overlay
from regraft.core.quantised import int8_parts, nf4_parts
from regraft.core.quantize import quantize_patch
from regraft.core.sources.bitsandbytes import dequantise
from regraft.core.sources.folder import open_folder
from regraft.core.tensors import LazyTensor, MemoryTensor
from regraft.core.writer import WriteOptions, Writer
from regraft.kernels.four_bit import block_scales, decode, encode, pair_table
from tests.families import FAMILIES, save_tiny

pytestmark = [
    # torch's own compiler, imported by bitsandbytes, still uses what torch deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

METHODS = ("nf4", "int8")
QUANTISED_FAMILIES = [family for family in FAMILIES if family != "falcon"]
WHOLE_BLOCKS = {"intermediate_size": 128}
"""Rows of whole blocks: with others bitsandbytes' CPU kernels fail (see core/fourbit.py)."""


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes warns of every cast of an activation."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


def settings(method: str, **more):
    from transformers import BitsAndBytesConfig

    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return BitsAndBytesConfig(**(four_bit if method == "nf4" else {"load_in_8bit": True}), **more)


def reference(source: Path, target: Path, method: str, **more):
    """The model that transformers quantises from `source`, and the checkpoint that it writes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=settings(method, **more))
    model.save_pretrained(target)
    return model, open_folder(target, label="reference")


def quantised(base: Checkpoint, method: str) -> Checkpoint:
    return overlay(base, quantize_patch(base, method), by="output.quantize")


def write(checkpoint: Checkpoint, folder: Path) -> Path:
    """What an apply writes, without its records."""
    folder.mkdir()
    Writer(folder, WriteOptions(durable=False)).write(lay_out(checkpoint, 1 << 40))
    for name, file in checkpoint.files.items():
        (folder / name).write_bytes(file.read())
    return folder


def assert_same_tensors(found: Checkpoint, expected: Checkpoint):
    import torch

    assert dict(found.specs) == dict(expected.specs)
    for name in expected.tensors:
        assert torch.equal(found.load(name), expected.load(name)), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", QUANTISED_FAMILIES)
def test_every_tensor_equals_what_transformers_writes(family, method, tmp_path):
    base = open_folder(save_tiny(family, tmp_path / "base"), label="base")
    _, expected = reference(tmp_path / "base", tmp_path / "reference", method)
    assert_same_tensors(quantised(base, method), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_too(dtype, method, tmp_path):
    import torch

    base = open_folder(save_tiny("llama", tmp_path / "base", dtype=getattr(torch, dtype)), label="base")
    _, expected = reference(tmp_path / "base", tmp_path / "reference", method)
    assert_same_tensors(quantised(base, method), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "mixtral", "gpt2", "gpt_neox", "gemma3"])
def test_the_written_checkpoint_reloads_in_the_stock_class(family, method, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    size = {"n_inner": 128} if family == "gpt2" else {} if family == "gemma3" else WHOLE_BLOCKS
    base = open_folder(save_tiny(family, tmp_path / "base", **size), label="base")
    ours = quantised(base, method)
    folder = write(ours, tmp_path / "ours")
    skipped = ours.config["quantization_config"]["llm_int8_skip_modules"]
    model, expected = reference(tmp_path / "base", tmp_path / "reference", method, llm_int8_skip_modules=skipped)
    assert_same_tensors(open_folder(folder, label="ours"), expected)
    reloaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    if family != "gemma3" or method == "int8":  # its text model has rows of 96
        ids, mask = torch.arange(2, 18)[None], torch.ones(1, 16, dtype=torch.long)
        with torch.no_grad():
            logits = [each(input_ids=ids, attention_mask=mask).logits for each in (reloaded, model)]
        assert torch.isfinite(logits[0]).all()
        assert torch.equal(*logits)


@pytest.mark.parametrize("method", METHODS)
def test_the_config_is_what_transformers_writes(method, tmp_path):
    import torch

    base = open_folder(save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16), label="base")
    more = {"bnb_4bit_compute_dtype": "bfloat16"} if method == "nf4" else {}
    _, expected = reference(
        tmp_path / "base", tmp_path / "reference", method, llm_int8_skip_modules=["lm_head"], **more
    )
    assert quantised(base, method).config == {
        **base.config,
        "quantization_config": expected.config["quantization_config"],
    }


def test_a_config_without_a_dtype_gets_one(tmp_path):
    """Otherwise transformers would take the dtype of the first float tensor, which may be that of scales."""
    import torch

    folder = save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    config = json.loads((folder / CONFIG).read_text())
    del config["dtype"]
    (folder / CONFIG).write_text(json.dumps(config))
    assert quantised(open_folder(folder, label="base"), "int8").config["dtype"] == "bfloat16"


SKIPPED = {
    "llama": ["lm_head"],
    "llama-tied": ["lm_head"],
    "gpt2": ["lm_head"],
    "gpt_neox": ["lm_head", "embed_out"],
    "mixtral": ["lm_head", "block_sparse_moe.experts", "block_sparse_moe.gate"],
    "qwen3_moe": ["lm_head", "mlp.experts", "mlp.gate"],
    "gemma3": ["lm_head", "model.vision_tower", "vision_tower"],
}


@pytest.mark.parametrize("family", SKIPPED)
def test_what_stays_as_it_is_is_listed(family, tmp_path):
    base = open_folder(save_tiny(family, tmp_path / "base"), label="base")
    listed = quantised(base, "nf4").config["quantization_config"]["llm_int8_skip_modules"]
    assert listed[0] == "lm_head"
    assert sorted(listed) == sorted(SKIPPED[family])


def test_an_unknown_layer_that_ends_like_a_known_one_is_listed_by_its_whole_path(tmp_path):
    import torch

    base = open_folder(save_tiny("llama", tmp_path / "base"), label="base")
    name = "model.layers.0.extra.3.mlp.up_proj.weight"
    tensors = {**base.tensors, name: MemoryTensor(name, torch.zeros(4, 4))}
    wider = Checkpoint("base", tensors, base.files)
    kept = quantised(wider, "int8").config["quantization_config"]["llm_int8_skip_modules"]
    assert kept == ["lm_head", "extra.3.mlp.up_proj"]
    name = "model.layers.0.mlp.up_proj.weight"
    other = name.replace("layers.0.mlp", "adapters.0.mlp")
    wider = Checkpoint("base", {**base.tensors, other: MemoryTensor(other, torch.zeros(4, 4))}, base.files)
    kept = quantised(wider, "int8").config["quantization_config"]["llm_int8_skip_modules"]
    assert kept == ["lm_head", "model.adapters.0.mlp.up_proj"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_requantising_an_untouched_nf4_weight_changes_nothing(dtype, tmp_path):
    import torch

    save_tiny("llama", tmp_path / "base", dtype=getattr(torch, dtype))
    _, stored = reference(tmp_path / "base", tmp_path / "nf4", "nf4")
    shown = dequantise(stored)
    again = quantised(shown, "nf4")
    assert_same_tensors(again, stored)
    weight = "model.layers.0.mlp.down_proj.weight"
    assert again.raw(weight) == stored.raw(weight)
    assert again.raw(f"{weight}.absmax") == stored.raw(f"{weight}.absmax")
    computed = Checkpoint("base", {name: Opaque(tensor) for name, tensor in shown.tensors.items()}, shown.files)
    assert quantised(computed, "nf4").raw(weight) is None
    assert_same_tensors(quantised(computed, "nf4"), stored)


def test_untouched_8_bit_weights_are_copied(tmp_path):
    save_tiny("gpt2", tmp_path / "base")
    _, stored = reference(tmp_path / "base", tmp_path / "int8", "int8")
    again = quantised(dequantise(stored), "int8")
    assert_same_tensors(again, stored)
    weight = "transformer.h.0.attn.c_attn.weight"
    assert again.raw(weight) == stored.raw(weight)


def test_a_doubly_quantised_weight_keeps_its_codes(tmp_path):
    import torch

    save_tiny("llama", tmp_path / "base")
    _, stored = reference(tmp_path / "base", tmp_path / "nf4", "nf4", bnb_4bit_use_double_quant=True)
    again = quantised(dequantise(stored), "nf4")
    weight = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(again.load(weight), stored.load(weight))
    assert again.specs[f"{weight}.absmax"].dtype == "F32"
    assert f"{weight}.nested_absmax" not in again.specs


class Opaque(LazyTensor):
    """A tensor that does not tell where it comes from, and perhaps can only be had whole."""

    def __init__(self, tensor, *, row_local=True):
        self.spec, self.tensor, self.local, self.computed = tensor.spec, tensor, row_local, 0

    @property
    def row_local(self):
        return self.local

    def open(self, device="cpu"):
        read = self.tensor.open(device)

        def counted(start, stop):
            assert self.local or (start, stop) == (0, self.spec.rows)
            self.computed += 1
            return read(start, stop)

        return counted


def test_a_plan_needs_no_torch_and_is_exact(tmp_path):
    for family in ("llama", "gpt2", "qwen3_moe"):
        save_tiny(family, tmp_path / family)
    code = (
        "import sys; from pathlib import Path\n"
        "from regraft.core.layout import lay_out\n"
        "from regraft.core.patch import overlay\n"
        "from regraft.core.quantize import quantize_patch\n"
        "from regraft.core.sources.bitsandbytes import dequantise\n"
        "from regraft.core.sources.folder import open_folder\n"
        "for folder in sys.argv[1:]:\n"
        "    base = open_folder(Path(folder), label=folder)\n"
        "    for method in ('nf4', 'int8'):\n"
        "        above = overlay(base, quantize_patch(base, method), by='q')\n"
        "        assert dict(dequantise(above).specs) == dict(base.specs)\n"
        "        print(lay_out(above, 1 << 40).shards[0].nbytes)\n"
        "assert not {'torch', 'bitsandbytes', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / family) for family in ("llama", "gpt2", "qwen3_moe"))]
    planned = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    for family in ("llama", "gpt2", "qwen3_moe"):
        base = open_folder(tmp_path / family, label="base")
        for method in METHODS:
            folder = write(quantised(base, method), tmp_path / f"{family}-{method}")
            assert (folder / "model.safetensors").stat().st_size == int(planned.pop(0))


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


def test_falcon_is_refused(tmp_path):
    base = open_folder(save_tiny("falcon", tmp_path / "base"), label="base")
    with pytest.raises(Unsupported, match="FalconLinear"):
        quantize_patch(base, "nf4")


def test_transformers_still_passes_over_falcon(tmp_path):
    """When this fails, falcon can be quantised: remove its refusal."""
    save_tiny("falcon", tmp_path / "base")
    _, stored = reference(tmp_path / "base", tmp_path / "int8", "int8")
    assert "I8" not in {spec.dtype for spec in stored.specs.values()}


@pytest.mark.parametrize("dtype", ["float64", "float8_e4m3fn"])
def test_dtypes_that_cannot_be_quantised_are_refused(dtype, tmp_path):
    import torch

    base = open_folder(save_tiny("llama", tmp_path / "base"), label="base")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = {**base.tensors, name: MemoryTensor(name, base.load(name).to(getattr(torch, dtype)))}
    with pytest.raises(Unsupported, match=r"up_proj\.weight: cannot be quantised") as caught:
        quantize_patch(Checkpoint("base", tensors, base.files), "nf4")
    assert "dtype" in str(caught.value.remedy)


def test_values_beyond_float16_are_not_written_as_8_bit(tmp_path):
    import torch

    base = open_folder(save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16), label="base")
    name = "model.layers.1.mlp.up_proj.weight"
    huge = base.load(name)
    huge[3, 5] = 1e6
    broken = Checkpoint("base", {**base.tensors, name: MemoryTensor(name, huge)}, base.files)
    with pytest.raises(TransformationError, match=r"up_proj\.SCB: the result is not finite"):
        write(quantised(broken, "int8"), tmp_path / "out")


def test_notes_tell_what_was_done_and_what_bitsandbytes_cannot_run(tmp_path):
    base = open_folder(save_tiny("llama", tmp_path / "base"), label="base")
    done, warning = quantize_patch(base, "nf4").notes
    assert done.startswith("14 linear layers are quantised to nf4")
    assert warning.startswith("2 of them have rows that are no multiple of 64")
    assert len(quantize_patch(base, "int8").notes) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [nf4_parts, int8_parts], ids=METHODS)
def test_the_bytes_do_not_depend_on_the_device(parts):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for part in parts(MemoryTensor("m.weight", matrix(600, 320, "bfloat16"))):
        assert torch.equal(part.load("cuda").cpu(), part.load("cpu")), part.spec.name
