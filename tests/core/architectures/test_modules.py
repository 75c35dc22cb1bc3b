"""From module paths, as adapters name them, to tensors; and experts on disk against experts in memory."""

import pytest

from regraft.core.architectures import architecture_of
from regraft.core.errors import InputError
from tests.core.architectures.saved import write
from tests.families import FAMILIES, VARIANTS, tiny

NAMES = (*FAMILIES, "gemma3", *VARIANTS)
MIXTURES = ("mixtral", "qwen3_moe", "qwen3_moe-all-sparse", "qwen3_moe-every-second")


def text_modules(checkpoint):
    """Paths of live modules with a weight, but for those beside the text model."""
    for path, module in checkpoint.model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and not checkpoint.architecture.ignores(f"{path}.weight"):
            yield path, module


@pytest.mark.parametrize("name", NAMES)
def test_every_live_module_has_its_tensor(saved, name):
    import torch

    checkpoint = saved(name)
    paths = list(text_modules(checkpoint))
    assert len(paths) > 10
    for path, module in paths:
        slot = checkpoint.architecture.slot_of_module(path)
        assert torch.equal(checkpoint.tensors[slot.tensor], module.weight), path
        assert tuple(module.weight.shape) == slot.shape
        assert (slot.bias is not None) == (getattr(module, "bias", None) is not None)
        assert slot.module == path
        assert slot.whole
        if slot.bias is not None:
            assert torch.equal(checkpoint.tensors[slot.bias], module.bias)


@pytest.mark.parametrize(
    ("name", "spelling", "tensor"),
    [
        ("llama", "layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj.weight"),
        ("gpt2", "h.1.attn.c_attn", "transformer.h.1.attn.c_attn.weight"),
        ("gpt_neox", "embed_out", "embed_out.weight"),
        ("gpt_neox", "lm_head", "embed_out.weight"),
        ("mixtral", "model.layers.0.block_sparse_moe.gate", "model.layers.0.block_sparse_moe.gate.weight"),
        ("mixtral", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate.weight"),
        (
            "mixtral",
            "model.layers.1.block_sparse_moe.experts.3.w2",
            "model.layers.1.block_sparse_moe.experts.3.w2.weight",
        ),
        ("qwen3_moe", "model.layers.0.mlp.experts.2.up_proj", "model.layers.0.mlp.experts.2.up_proj.weight"),
        (
            "gemma3",
            "language_model.model.layers.0.mlp.up_proj",
            "language_model.model.layers.0.mlp.up_proj.weight",
        ),
        ("gemma2", "lm_head", "model.embed_tokens.weight"),
    ],
)
def test_paths_of_other_releases_are_known(saved, name, spelling, tensor):
    slot = saved(name).architecture.slot_of_module(spelling)
    assert slot.tensor == tensor
    assert slot.tensor in saved(name).tensors


def test_a_fused_module_gives_all_its_roles(saved):
    slot = saved("phi3").architecture.slot_of_module("model.layers.0.self_attn.qkv_proj")
    assert slot.role == "q_proj+k_proj+v_proj"
    assert slot.whole
    assert slot.num_rows == 128


def test_a_base_model_checkpoint_takes_paths_of_the_whole_model(tmp_path):
    architecture = write(tiny("llama").base_model, tmp_path).architecture
    slot = architecture.slot_of_module("model.layers.0.self_attn.q_proj")
    assert slot.tensor == "layers.0.self_attn.q_proj.weight"
    assert slot.module == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "path",
    [
        "model.layers.2.self_attn.q_proj",
        "model.layers.0.self_attn.qproj",
        "model.layers.0.mlp.experts.0.up_proj",
        "q_proj",
    ],
)
def test_unknown_modules_are_refused_by_name(saved, path):
    with pytest.raises(InputError, match="no such module") as refusal:
        saved("llama").architecture.slot_of_module(path)
    assert refusal.value.where == path
    assert refusal.value.remedy


def test_a_near_miss_is_suggested(saved):
    with pytest.raises(InputError) as refusal:
        saved("llama").architecture.slot_of_module("model.layers.1.self_attn.qproj")
    assert "model.layers.0.self_attn.q_proj" in str(refusal.value)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("stacked", [False, True])
def test_experts_on_disk_are_those_in_memory(saved, name, stacked):
    import torch

    checkpoint = saved(name)
    live = checkpoint.model.state_dict()
    tensors = live if stacked else checkpoint.tensors
    architecture = architecture_of(checkpoint.config, tensors)
    parameters = [key for key in live if ".mlp.experts." in key]
    assert parameters
    for path in parameters:
        experts = architecture.expert_tensors(path)
        assert len(experts) == architecture.num_experts == 4
        for number, slots in enumerate(experts):
            matrix = torch.cat([slot.read(tensors[slot.tensor]) for slot in slots])
            assert torch.equal(matrix, live[path][number])
            assert all((slot.expert == number) == stacked for slot in slots)


@pytest.mark.parametrize(
    ("name", "single"), [("mixtral", "block_sparse_moe.experts.2.w3"), ("qwen3_moe", "mlp.experts.2.up_proj")]
)
def test_modules_of_single_experts_are_found_in_stacks(saved, name, single):
    import torch

    checkpoint = saved(name)
    live = checkpoint.model.state_dict()
    slot = architecture_of(checkpoint.config, live).slot_of_module(f"model.layers.0.{single}")
    assert slot.tensor == "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(slot.read(live[slot.tensor]), checkpoint.tensors[f"model.layers.0.{single}.weight"])


def test_a_dense_layer_has_no_stacked_parameter(saved):
    with pytest.raises(InputError, match="no such stacked parameter"):
        saved("qwen3_moe").architecture.expert_tensors("model.layers.1.mlp.experts.gate_up_proj")


@pytest.mark.parametrize("name", MIXTURES)
def test_stacked_experts_load_back_into_the_stock_class(saved, name, tmp_path):
    """The layout of memory is one that `from_pretrained` reads, which is why it is supported on disk."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = saved(name).model
    model.config.save_pretrained(tmp_path)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.state_dict()["model.layers.1.self_attn.q_proj.weight"],
                       model.state_dict()["model.layers.1.self_attn.q_proj.weight"])  # fmt: skip
    again = write(loaded, tmp_path / "again")
    assert again.architecture.expected_specs() == again.shapes
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in again.tensors)
