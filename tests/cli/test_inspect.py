"""`regraft inspect`."""

from pathlib import Path

from tests.running import done


def test_for_people(workplace):
    Path("base/pytorch_model.bin").write_bytes(b"\x80")
    out = done("inspect", "base").out
    assert out.startswith("base: llama, 0.1 M parameters, 313 kB\n")
    assert "  architectures: LlamaForCausalLM\n" in out
    assert "  sizes: num_layers 2, hidden_size 64, " in out
    assert "  dtypes: F32 21\n" in out
    assert "  not carried: pytorch_model.bin " in out


def test_tensors(workplace):
    lines = done("inspect", "base", "--tensors").out.splitlines()
    assert "  model.norm.weight  F32 [64]" in lines
    assert len([line for line in lines if "  F32 [" in line]) == 21


def test_json(workplace):
    facts = done("inspect", "base", "--json").json
    assert facts["schema"] == 1
    assert facts["parameters"] == 78144
    assert "tensor_list" not in facts
    listed = done("inspect", "base", "--json", "--tensors").json["tensor_list"]
    assert len(listed) == 21
    assert {"name", "dtype", "shape", "file"} == set(listed[0])


def test_a_single_file(tiny_folder):
    facts = done("inspect", tiny_folder("llama", shards=None) / "model.safetensors", "--json").json
    assert facts["weight_files"] == ["model.safetensors"]
