"""A family that neither regraft nor transformers knows: modules go by the names of the tensors."""

import json

import pytest
import torch
from safetensors.torch import save_file

from regraft.core.checkpoint import Checkpoint, FileRef
from regraft.core.errors import InputError
from regraft.core.tensors import MemoryTensor
from regraft.kernels.lora_merge import reference
from tests.plugins.lora_merge.adapters import merged_by_us


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def checkpoint(**config):
    tensors = {
        "net.wte.weight": random(20, 8),
        "net.h.0.mix.weight": random(8, 8, seed=1),
        "net.h.0.mix.bias": random(8, seed=2),
        "net.norm.weight": random(8, seed=3),
    }
    lazy = {name: MemoryTensor(name, tensor) for name, tensor in tensors.items()}
    data = json.dumps({"model_type": "nobodys", **config}).encode()
    return Checkpoint("base", lazy, {"config.json": FileRef(data=data)})


def adapter(folder, tensors, **config):
    folder.mkdir()
    stored = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("transposed", [False, True])
def test_the_adapters_flag_says_how_weights_are_stored(transposed, tmp_path):
    down, up = random(2, 8, seed=4), random(8, 2, seed=5)
    factors = {"net.h.0.mix.lora_A.weight": down, "net.h.0.mix.lora_B.weight": up, "net.h.0.mix.lora_B.bias": random(8)}
    base = checkpoint()
    merged = merged_by_us(base, adapter(tmp_path / "a", factors, fan_in_fan_out=transposed))
    left, right = (down.T, up.T) if transposed else (up, down)
    expected = reference(base.load("net.h.0.mix.weight"), left, right, 1.0)
    assert torch.equal(merged.load("net.h.0.mix.weight"), expected)
    assert torch.equal(merged.load("net.h.0.mix.bias"), base.load("net.h.0.mix.bias") + random(8))


def test_a_tied_head_is_found_by_its_name(tmp_path):
    down, up = random(2, 8, seed=4), random(20, 2, seed=5)
    factors = {"lm_head.lora_A.weight": down, "lm_head.lora_B.weight": up}
    base = checkpoint(tie_word_embeddings=True)
    merged = merged_by_us(base, adapter(tmp_path / "a", factors))
    assert torch.equal(merged.load("lm_head.weight"), reference(base.load("net.wte.weight"), up, down, 1.0))
    assert torch.equal(merged.load("net.wte.weight"), base.load("net.wte.weight"))
    assert merged.config["tie_word_embeddings"] is False


def test_whole_parameters(tmp_path):
    brought = {"net.norm.weight": random(8, seed=6), "net.h.0.mix.bias": random(8, seed=7).half()}
    merged = merged_by_us(checkpoint(), adapter(tmp_path / "a", brought))
    assert torch.equal(merged.load("net.norm.weight"), brought["net.norm.weight"])
    assert torch.equal(merged.load("net.h.0.mix.bias"), brought["net.h.0.mix.bias"].float())


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("net.h.1.mix", "a matrix for net.h.1.mix in the base"),
        ("net.norm", "a matrix, which net.norm.weight F32 [8] is not"),
        ("lm_head", "a matrix for lm_head in the base"),
    ],
)
def test_modules_that_are_no_matrix_there(path, expected, tmp_path):
    factors = {f"{path}.lora_A.weight": random(2, 8), f"{path}.lora_B.weight": random(8, 2)}
    with pytest.raises(InputError, match="2 of the adapter's 2 tensors") as error:
        merged_by_us(checkpoint(), adapter(tmp_path / "a", factors))
    assert error.value.expected == expected
