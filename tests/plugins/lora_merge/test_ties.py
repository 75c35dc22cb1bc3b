"""Tied embeddings and heads: the merged model computes what the adapter computed while it stood beside the weights."""

import warnings

import pytest
import torch

from regraft.core.sources.folder import open_folder
from regraft.plugins.lora_merge import LoraMerge
from regraft.plugins.lora_merge.params import LoraMergeParams
from tests.families import save_tiny
from tests.materialise import materialise
from tests.plugins.lora_merge.adapters import (
    adapted_logits,
    load_model,
    make_adapter,
    merged_by_peft,
    merged_by_us,
    tensors_of,
)

IDS = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(0))
TIED = {
    "llama-tied": ("model.embed_tokens", "lm_head"),
    "gpt2": ("transformer.wte", "lm_head"),
    "gpt_neox-tied": ("gpt_neox.embed_in", "embed_out"),
    "gemma2": ("model.embed_tokens", "lm_head"),
}
PROJECTION = {"gpt2": "c_attn", "gpt_neox-tied": "query_key_value"}


def logits(folder):
    with torch.no_grad():
        return load_model(folder)(input_ids=IDS).logits


def adapt(family, tmp_path, **config):
    base = save_tiny(family, tmp_path / "base")
    return base, make_adapter(base, tmp_path / "adapter", **config)


def check(base, adapter, tmp_path, *, head):
    """Compare logits; `head` is the tensor that a parted head gets, or None if embeddings and head stay one."""
    merged = merged_by_us(base, adapter)
    added = set(merged.specs) - set(open_folder(base, label="base").specs)
    assert added == ({f"{head}.weight"} if head else set())
    assert bool(merged.config["tie_word_embeddings"]) is (head is None)
    difference = logits(materialise(merged, tmp_path / "out")) - adapted_logits(base, adapter, IDS)
    assert difference.abs().max() < 2e-5
    return merged


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("side", [0, 1], ids=["embeddings", "head"])
def test_an_adapter_of_one_side_leaves_the_other(family, side, tmp_path):
    embeddings, head = TIED[family]
    target = (embeddings.split(".")[-1], "lm_head")[side]
    base, adapter = adapt(family, tmp_path, target_modules=[target])
    merged, before = check(base, adapter, tmp_path, head=head), open_folder(base, label="base")
    kept, changed = (
        (f"{head}.weight", f"{embeddings}.weight") if side == 0 else (f"{embeddings}.weight", f"{head}.weight")
    )
    original = before.load(f"{embeddings}.weight")
    assert torch.equal(merged.load(kept), original)
    assert not torch.equal(merged.load(changed), original)


@pytest.mark.parametrize("family", TIED)
def test_two_adapters_for_two_sides(family, tmp_path):
    embeddings, head = TIED[family]
    base, adapter = adapt(family, tmp_path, target_modules=[embeddings.split(".")[-1], "lm_head"])
    check(base, adapter, tmp_path, head=head)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2"])
def test_equals_peft_on_a_model_that_was_untied_first(family, tmp_path):
    """As peft's own warning advises."""
    base, adapter = adapt(family, tmp_path, target_modules=["embed_tokens", "lm_head"])
    ours, theirs = tensors_of(merged_by_us(base, adapter)), merged_by_peft(base, adapter, untied=True)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2"])
def test_an_adapter_that_keeps_them_tied(family, tmp_path):
    base, adapter = adapt(family, tmp_path, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    check(base, adapter, tmp_path, head=None)


@pytest.mark.parametrize("family", TIED)
@pytest.mark.parametrize("side", [0, 1], ids=["embeddings", "head"])
def test_one_side_saved_whole(family, side, tmp_path):
    embeddings, head = TIED[family]
    saved = [(embeddings.split(".")[-1], "lm_head")[side]]
    base, adapter = adapt(family, tmp_path, target_modules=[PROJECTION.get(family, "q_proj")], modules_to_save=saved)
    check(base, adapter, tmp_path, head=head)


def test_both_saved_whole_as_one(tmp_path):
    modules = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    base, adapter = adapt("llama-tied", tmp_path, **modules, ensure_weight_tying=True)
    check(base, adapter, tmp_path, head=None)


def test_dora_of_a_tied_head(tmp_path):
    base, adapter = adapt("llama-tied", tmp_path, target_modules=["lm_head"], use_dora=True)
    check(base, adapter, tmp_path, head="lm_head")


def test_an_adapter_of_neither_leaves_them_tied(tmp_path):
    base, adapter = adapt("llama-tied", tmp_path, target_modules=["q_proj"])
    check(base, adapter, tmp_path, head=None)


def test_a_second_step_finds_them_untied(tmp_path):
    base, adapter = adapt("llama-tied", tmp_path, target_modules=["lm_head"])
    once = merged_by_us(base, adapter)
    twice = merged_by_us(once, adapter)
    assert set(twice.specs) == set(once.specs)
    assert torch.equal(twice.load("model.embed_tokens.weight"), once.load("model.embed_tokens.weight"))
    assert not torch.equal(twice.load("lm_head.weight"), once.load("lm_head.weight"))


def test_a_tied_head_that_is_stored_a_second_time(tmp_path):
    from safetensors.torch import load_file, save_file

    base, adapter = adapt("llama-tied", tmp_path, target_modules=["lm_head"])
    expected = merged_by_us(base, adapter)
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    merged = merged_by_us(base, adapter)
    assert merged.config["tie_word_embeddings"] is False
    assert torch.equal(merged.load("lm_head.weight"), expected.load("lm_head.weight"))
    assert torch.equal(merged.load("model.embed_tokens.weight"), tensors["model.embed_tokens.weight"])


def test_the_nested_config_of_a_vision_model(tmp_path):
    base = save_tiny("gemma3", tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = make_adapter(base, tmp_path / "adapter", target_modules=r".*language_model\.embed_tokens")
    patch = LoraMerge().patch(open_folder(base, label="base"), LoraMergeParams(adapter=adapter))
    assert patch.json["config.json"]["tie_word_embeddings"] is False
    assert len(patch.edits) == 2
