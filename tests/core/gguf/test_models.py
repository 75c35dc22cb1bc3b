"""Models out of GGUF files against the models they were written from, and against transformers' own GGUF loader."""

from __future__ import annotations

import pytest
import torch

from regraft.core.sources import open_checkpoint
from tests.core.gguf.writing import write_model
from tests.families import tiny

FAMILIES = [
    "llama",
    "llama-biased",
    "llama-tied",
    "llama-multi-head",
    "llama-wide-heads",
    "mistral",
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "qwen3-biased",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi3-multi-head",
]

IDS = torch.arange(40)[None] * 3 % 128


def stored_names(model):
    skip = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    return [name for name in model.state_dict() if name not in skip]


def rebuilt(checkpoint, folder):
    """The stock class with the checkpoint's config and tensors, as a user would load it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (folder / "config.json").write_bytes(checkpoint.files["config.json"].read())
    config = AutoConfig.from_pretrained(folder)
    state = {name: checkpoint.load(name) for name in checkpoint.tensors}
    model, report = type(AutoModelForCausalLM.from_config(config)).from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_model_comes_back_as_it_was(family, tmp_path):
    model = tiny(family)
    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", model))
    assert sorted(checkpoint.tensors) == sorted(stored_names(model))
    shifted = family.startswith("gemma")
    for name in checkpoint.tensors:
        loaded, original = checkpoint.load(name), model.state_dict()[name]
        if shifted and name.endswith("norm.weight"):
            torch.testing.assert_close(loaded, original, rtol=0, atol=2e-7)
        else:
            assert torch.equal(loaded, original), name
    again = rebuilt(checkpoint, tmp_path)
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5 if shifted else 0.0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_agrees_with_transformers_loader(family, tmp_path):
    from transformers import AutoModelForCausalLM

    sizes = {"head_dim": 128} if family == "qwen3" else {}  # the only one that their loader knows for it
    path = write_model(tmp_path / "model.gguf", tiny(family, **sizes), "Q4_1", change=_vocabulary)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    ours = open_checkpoint(path)
    assert len(ours.tensors) > 20
    for name in ours.tensors:
        assert torch.equal(ours.load(name), theirs[name]), name


def _vocabulary(writer):
    """transformers' loader wants special ids."""
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def test_special_ids_reach_both_configs(tmp_path):
    def change(writer):
        _vocabulary(writer)
        writer.add_eot_token_id(5)
        writer.add_pad_token_id(0)

    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", tiny("llama"), change=change))
    assert {key: checkpoint.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0}


def test_origin_and_notes_say_what_was_read(tmp_path):
    path = write_model(tmp_path / "model.gguf", tiny("llama"), "Q8_0")
    checkpoint = open_checkpoint(path)
    assert checkpoint.origin["source"] == "gguf"
    assert checkpoint.origin["bytes"] == path.stat().st_size
    assert checkpoint.origin["encodings"] == {"F32": 5, "Q8_0": 16}
    assert str(tmp_path) not in repr(checkpoint.origin)
    assert any("16 Q8_0" in note for note in checkpoint.notes)
    assert any("no tokenizer" in note for note in checkpoint.notes)


def test_config_has_short_decimals_and_no_leaked_name(tmp_path):
    model = tiny("llama", rms_norm_eps=1e-5, rope_theta=500000.0)
    checkpoint = open_checkpoint(
        write_model(tmp_path / "m.gguf", model, change=lambda w: w.add_rope_freq_base(500000.0))
    )
    assert checkpoint.config["rms_norm_eps"] == 1e-5
    assert checkpoint.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert checkpoint.config["dtype"] == "float32"
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert "_model_name_or_path" not in checkpoint.config


def test_opening_imports_neither_torch_nor_transformers(tmp_path):
    import subprocess
    import sys

    path = write_model(tmp_path / "model.gguf", tiny("llama"), "Q8_0")
    code = (
        "import sys, regraft.core.sources.gguf, regraft.core.sources.hub;"
        "from regraft.core.sources import open_checkpoint;"
        "early = {'numpy', 'gguf', 'huggingface_hub'} & set(sys.modules);"
        f"checkpoint = open_checkpoint({str(path)!r}); checkpoint.digest;"
        "print(early, {'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set() set()"
