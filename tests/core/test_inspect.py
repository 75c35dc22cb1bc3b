"""What a checkpoint is, from headers and config alone."""

import json

import pytest

from regraft.core.inspect import describe, describe_tensors
from regraft.core.sources import open_checkpoint
from tests.checkpoints import write_checkpoint


def test_a_llama(tiny_folder):
    folder = tiny_folder("llama")
    facts = describe(open_checkpoint(folder))
    assert facts["checkpoint"] == str(folder)
    assert facts["model_type"] == "llama"
    assert facts["architectures"] == ["LlamaForCausalLM"]
    assert facts["sizes"] == {
        "num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 16, "vocab_size": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    assert facts["rope"]["rope_theta"] == 10000.0
    assert facts["max_position_embeddings"] == 128
    assert (facts["parameters"], facts["bytes"], facts["tensors"]) == (78144, 312576, 21)
    assert facts["dtypes"] == {"F32": 21}
    assert len(facts["weight_files"]) == 6
    assert facts["files"]["config.json"] == (folder / "config.json").stat().st_size
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("family", "kv_heads", "head_dim"), [("gpt2", 4, 16), ("qwen3", 2, 24), ("gemma3_text", 2, 24), ("falcon", 2, 16)]
)
def test_names_are_those_of_llama_in_every_family(family, kv_heads, head_dim, tiny_folder):
    sizes = describe(open_checkpoint(tiny_folder(family)))["sizes"]
    assert (sizes["hidden_size"], sizes["num_layers"], sizes["num_heads"]) == (64, 2, 4)
    assert (sizes["num_kv_heads"], sizes["head_dim"]) == (kv_heads, head_dim)


@pytest.mark.parametrize(
    ("config", "rope"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"rope_type": "default", "rope_theta": 1e4}),
        ({}, None),
    ],
)
def test_old_and_new_forms_of_rotary_settings(config, rope, tmp_path):
    import torch

    folder = write_checkpoint(tmp_path / "base", {"w": torch.ones(1)}, config={"model_type": "unheard-of", **config})
    facts = describe(open_checkpoint(folder))
    assert facts["rope"] == rope
    assert facts["sizes"] == {}


def test_tensors_in_the_order_of_their_files(tiny_folder):
    folder = tiny_folder("llama")
    rows = describe_tensors(open_checkpoint(folder))
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    assert {
        "name": "model.norm.weight",
        "dtype": "F32",
        "shape": [64],
        "file": "model-00006-of-00006.safetensors",
    } in rows
