"""What is refused: one error, which names file, tensor, what was expected and found, and what to do."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.errors import InputError, Unsupported
from tests.families import save_tiny
from tests.plugins.lora_merge.adapters import edit_config, make_adapter, merged_by_us

FILE = "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(base, tmp_path):
    folder = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    return edit_config(folder, base_model_name_or_path="meta/llama-tiny")


def change(adapter, changes):
    """Rewrite the adapter's tensors: a function of the old ones."""
    save_file(changes(load_file(adapter / FILE)), adapter / FILE, {"format": "pt"})
    return adapter


def refusal(base, adapter, kind=InputError, **params):
    with pytest.raises(kind) as error:
        merged_by_us(base, adapter, **params)
    return error.value


def test_an_adapter_for_a_wider_model(adapter, tmp_path):
    narrow = save_tiny("llama", tmp_path / "narrow", hidden_size=32)
    first, second = Q_PROJ, Q_PROJ.replace(".0.", ".1.")
    down, up = "F32 [4, 64]", "F32 [64, 4]"
    names = (f"{first}.lora_A.weight {down}", f"{first}.lora_B.weight {up}", f"{second}.lora_A.weight {down}")
    assert str(refusal(narrow, adapter)).splitlines() == [
        f"{adapter / FILE}: 4 of the adapter's 4 tensors do not fit the base model",
        "  expected: lora_A [4, 32], lora_B [32, 4] for model.layers.0.self_attn.q_proj.weight [32, 32]",
        f"  found: {'; '.join(names)}; and 1 more",
        "  remedy: use the model that the adapter was made for: meta/llama-tiny",
    ]


def test_an_adapter_for_a_deeper_model(adapter, tmp_path):
    shallow = save_tiny("llama", tmp_path / "shallow", num_hidden_layers=1)
    error = refusal(shallow, adapter)
    assert error.message == "2 of the adapter's 4 tensors do not fit the base model"
    assert error.expected == "a matrix for model.layers.1.self_attn.q_proj in the base"


def test_an_adapter_for_another_family(base, tmp_path):
    gpt2 = save_tiny("gpt2", tmp_path / "gpt2")
    adapter = make_adapter(gpt2, tmp_path / "adapter", target_modules=["c_attn"])
    error = refusal(base, adapter)
    assert error.message == "4 of the adapter's 4 tensors do not fit the base model"
    assert "transformer.h.0.attn.c_attn" in error.expected


def test_a_misspelt_module(base, adapter):
    change(adapter, lambda tensors: {name.replace("q_proj", "q_pro"): tensor for name, tensor in tensors.items()})
    attention = "model.layers.0.self_attn"
    expected = f"a matrix for {attention}.q_pro in the base (the nearest is {attention}.q_proj.weight)"
    assert refusal(base, adapter).expected == expected


def test_a_rank_that_the_config_does_not_give(base, adapter):
    error = refusal(base, edit_config(adapter, r=8))
    assert error.expected.startswith("lora_A [8, 64], lora_B [64, 8] for model.layers.0.self_attn.q_proj.weight")
    assert f"{Q_PROJ}.lora_A.weight F32 [4, 64]" in error.found


def test_half_a_pair(base, adapter):
    change(adapter, lambda tensors: {name: t for name, t in tensors.items() if name != f"{Q_PROJ}.lora_B.weight"})
    error = refusal(base, adapter)
    assert error.message == "1 of the adapter's 3 tensors do not fit the base model"
    assert error.found == f"{Q_PROJ}.lora_A.weight F32 [4, 64]"


def test_every_tensor_must_have_a_place(base, adapter):
    extra = {"base_model.model.score.weight": torch.zeros(2, 64), "base_model.model.model.norm.weight": torch.ones(63)}
    change(adapter, lambda tensors: {**tensors, **extra})
    error = refusal(base, adapter)
    assert error.message == "2 of the adapter's 6 tensors do not fit the base model"
    assert "score.weight F32 [2, 64]" in error.found
    assert "norm.weight F32 [63]" in error.found


def test_two_modules_for_one_tensor(base, adapter):
    def double(tensors):
        return {**tensors, **{name.replace(".model.layers", ".layers"): tensor + 0 for name, tensor in tensors.items()}}

    error = refusal(base, change(adapter, double))
    assert error.message == "4 of the adapter's 8 tensors do not fit the base model"
    assert error.expected == "one module of the adapter for model.layers.0.self_attn.q_proj.weight, not two"


def test_magnitudes_and_the_flag_belong_together(base, adapter, tmp_path):
    assert "lora_magnitude_vector [64]" in refusal(base, edit_config(adapter, use_dora=True)).expected
    dora = make_adapter(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    assert "lora_magnitude_vector" in refusal(base, edit_config(dora, use_dora=False)).found


def test_a_bias_for_a_base_without_one(base, adapter):
    change(adapter, lambda tensors: {**tensors, f"{Q_PROJ}.lora_B.bias": torch.zeros(64)})
    expected = "a bias of model.layers.0.self_attn.q_proj in the base, to which the adapter's can be added"
    assert refusal(base, adapter).expected == expected


def test_half_a_dora(base, tmp_path):
    dora = make_adapter(base, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    assert refusal(base, dora, Unsupported, scale=0.5).message.startswith("a DoRA adapter has no half")


def test_a_base_that_the_initialisation_changed(base, adapter):
    edit_config(adapter, init_lora_weights="pissa_niter_4")
    error = refusal(base, adapter, Unsupported)
    assert error.message == "the adapter was initialised by pissa_niter_4, which changed the base weights it belongs to"
    assert merged_by_us(base, adapter, residual_base=True).specs


def test_a_base_in_float8(adapter, base, tmp_path):
    folder = tmp_path / "float8"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    error = refusal(folder, adapter, Unsupported)
    assert (error.found, error.where.endswith(name)) == ("F8_E4M3", True)


def test_no_folder(base, tmp_path):
    error = refusal(base, tmp_path / "org" / "name")
    assert error.message == "there is no such adapter folder"
    assert "download" in error.remedy


def test_a_pickle(base, adapter):
    (adapter / FILE).rename(adapter / "adapter_model.bin")
    error = refusal(base, adapter)
    assert error.where.endswith("adapter_model.bin")
    assert error.message == "is a pickle, and regraft never reads pickles: they can run code"


def test_no_weights(base, adapter):
    (adapter / FILE).unlink()
    assert refusal(base, adapter).message == "the adapter folder has no weights"


def test_a_truncated_file(base, adapter):
    (adapter / FILE).write_bytes((adapter / FILE).read_bytes()[:-8])
    assert "truncated" in refusal(base, adapter).message


def test_an_empty_file(base, adapter):
    assert refusal(base, change(adapter, lambda tensors: {})).message == "the adapter has no tensors"


def test_integer_factors(base, adapter):
    change(adapter, lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()})
    error = refusal(base, adapter)
    assert (error.message, error.found) == ("is no floating-point tensor", "I8")


def test_several_adapters_in_one_file(base, adapter):
    def double(tensors):
        return {name.replace(".weight", f".{which}.weight"): t + 0 for name, t in tensors.items() for which in "ab"}

    error = refusal(base, change(adapter, double), Unsupported)
    assert (error.message, error.found) == ("the file holds several adapters", "a, b")


@pytest.mark.parametrize("tensor", ["lora_diag", "lora_arrow.x.weight", "lora_A.x.y.weight", "lora_A.bias", "lora_B"])
def test_tensors_of_other_variants(tensor, base, adapter):
    change(adapter, lambda tensors: {**tensors, f"{Q_PROJ}.{tensor}": torch.zeros(4)})
    error = refusal(base, adapter, Unsupported)
    assert error.message == "the adapter has a tensor of a LoRA variant that regraft does not merge"
    assert error.where.endswith(f"{Q_PROJ}.{tensor}")


def test_trainable_tokens(base, adapter):
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    change(adapter, lambda tensors: {**tensors, name: torch.zeros(2, 64)})
    assert "trainable_token_indices" in refusal(base, adapter, Unsupported).message


def test_a_plan_imports_neither_torch_nor_transformers(base, adapter):
    code = f"""
import sys
from pathlib import Path
from regraft.core.sources.folder import open_folder
from regraft.plugins.lora_merge import LoraMerge
checkpoint = open_folder(Path({str(base)!r}), label="base")
params = LoraMerge.Params(adapter=Path({str(adapter)!r}))
LoraMerge().check(checkpoint, params)
outline = LoraMerge().plan(checkpoint, params)
assert len(outline.specs) == 2, outline
sys.exit(" ".join({{"torch", "transformers", "peft", "triton"}} & set(sys.modules)) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")
