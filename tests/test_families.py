"""The fixtures themselves: tiny models are deterministic, and different enough from nothing to test with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.families import FAMILIES, VARIANTS, save_tiny, tiny


@pytest.mark.parametrize("name", [*FAMILIES, "gemma3", *VARIANTS])
def test_logits_differ_clearly_between_positions_and_seeds(name):
    import torch

    tokens = torch.arange(3, 23)[None]
    with torch.inference_mode():
        first, again, other = (tiny(name, seed=seed)(tokens).logits for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert 0.4 < first.std() < 4
    assert (first - other).abs().max() > 1
    assert (first[0, 1:] - first[0, :-1]).abs().max(dim=-1).values.min() > 0.3


def test_families_that_share_names_share_weights():
    import torch

    llama, mistral = tiny("llama").state_dict(), tiny("mistral").state_dict()
    assert llama.keys() == mistral.keys()
    assert all(torch.equal(llama[key], mistral[key]) for key in llama)


def test_overrides_and_dtype():
    import torch

    model = tiny("llama", dtype=torch.bfloat16, num_hidden_layers=3, attention_bias=True)
    assert model.dtype == torch.bfloat16
    assert len(model.model.layers) == 3
    assert model.model.layers[2].self_attn.o_proj.bias.abs().max() > 0
    assert not model.training


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_checkpoint_is_sharded_and_has_a_tokenizer(tmp_path, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny(name, tmp_path / "saved", shards="60KB", tokenizer=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Hello, world: 1 + 2 = 3?"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids.max() < 128
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert AutoModelForCausalLM.from_pretrained(folder)(ids).logits.shape == (1, ids.shape[1], 128)


def test_importing_the_fixtures_is_cheap():
    code = "import sys, tests.families; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
