"""Adapters of experts, one by one or stacked as transformers 5 has them, on checkpoints of both kinds."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.architectures import architecture_of
from regraft.core.errors import InputError
from regraft.core.sources.folder import open_folder
from tests.families import save_tiny, tiny
from tests.plugins.lora_merge.adapters import edit_config, make_adapter, merged_by_peft, merged_by_us, tensors_of

FAMILIES = ("mixtral", "qwen3_moe-all-sparse")
EXPERTS = "model.layers.{}.mlp.experts"


def stacked(family, base, folder):
    """The checkpoint in `base` with every stack of experts as one tensor, as the stock class holds it."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    model, tensors = tiny(family), load_file(base / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    stacks = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".experts." in name}
    save_file({**kept, **stacks}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_factors_on_a_stacked_checkpoint(family, tmp_path):
    base = save_tiny(family, tmp_path / "base")
    names = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names)
    one_by_one = tensors_of(merged_by_us(base, adapter))
    below = open_folder(stacked(family, base, tmp_path / "stacked"), label="stacked")
    whole = tensors_of(merged_by_us(below, adapter))
    architecture = architecture_of(below.config, one_by_one)
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            stack = f"{EXPERTS.format(layer)}.{name}"
            for expert, slots in enumerate(architecture.expert_tensors(stack)):
                assert torch.equal(whole[stack][expert], torch.cat([one_by_one[slot.tensor] for slot in slots]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_one_parameter_alone(family, name, tmp_path):
    base = save_tiny(family, tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=[f"experts.{name}"])
    ours, theirs = tensors_of(merged_by_us(base, adapter)), merged_by_peft(base, adapter)
    before = tensors_of(open_folder(base, label="base"))
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)
    leaves = {"gate_up_proj": ("w1", "w3", "gate_proj", "up_proj"), "down_proj": ("w2", "down_proj")}[name]
    changed = {tensor for tensor in ours if ".experts." in tensor and not torch.equal(ours[tensor], before[tensor])}
    assert changed == {tensor for tensor in ours if ".experts." in tensor and tensor.split(".")[-2] in leaves}


def test_patterns_of_stacked_parameters(tmp_path):
    base = save_tiny("mixtral", tmp_path / "base")
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["w1", "w2", "w3"], use_rslora=True, alpha_pattern={"down_proj": 32}
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["rank_pattern"], "peft doubles the rank of the fused parameter by a pattern"
    ours, theirs = tensors_of(merged_by_us(base, adapter)), merged_by_peft(base, adapter)
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)


def test_experts_one_by_one(tmp_path):
    """An adapter from the days of transformers 4; peft converts it on loading, to the same numbers."""
    base = save_tiny("mixtral", tmp_path / "base")
    plain = make_adapter(base, tmp_path / "plain", target_modules=["q_proj"])
    adapter = edit_config(plain, target_modules=["w1", "w2", "w3"])
    generator = torch.Generator().manual_seed(3)
    shapes = {"w1": (96, 64), "w3": (96, 64), "w2": (64, 96)}
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            for name, (rows, cols) in shapes.items():
                at = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{at}.lora_A.weight"] = 0.1 * torch.randn(4, cols, generator=generator)
                tensors[f"{at}.lora_B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    ours, theirs = tensors_of(merged_by_us(base, adapter)), merged_by_peft(base, adapter)
    before = tensors_of(open_folder(base, label="base"))
    for name in theirs:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7), name
        assert torch.equal(ours[name], before[name]) is (".experts." not in name), name


def test_experts_of_another_number(tmp_path):
    base = save_tiny("mixtral", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["w2"])
    more = save_tiny("mixtral", tmp_path / "more", num_local_experts=8)
    with pytest.raises(InputError, match="4 of the adapter's 4 tensors") as error:
        merged_by_us(more, adapter)
    assert error.value.expected.startswith("lora_A [32, 96], lora_B [64, 32] for 8 experts of model.layers.0")
