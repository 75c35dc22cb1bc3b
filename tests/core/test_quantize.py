"""Output quantisation: the bytes that transformers writes, planned from headers, reloaded by stock classes."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.core.checkpoint import CONFIG, Checkpoint
from regraft.core.errors import TransformationError, Unsupported
from regraft.core.layout import lay_out
from regraft.core.patch import overlay
from regraft.core.quantize import quantize_patch
from regraft.core.sources.bitsandbytes import dequantise
from regraft.core.sources.folder import open_folder
from regraft.core.tensors import MemoryTensor
from regraft.core.writer import WriteOptions, Writer
from tests.core.quantising import METHODS, Opaque
from tests.families import FAMILIES, save_tiny

pytestmark = [
    # torch's own compiler, imported by bitsandbytes, still uses what torch deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

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
