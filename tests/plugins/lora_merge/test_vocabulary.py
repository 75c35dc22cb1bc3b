"""Adapters that were trained after the vocabulary had grown: peft saves the resized embeddings beside the factors."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from regraft.core.errors import InputError
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.row_map import row_map
from regraft.core.sources.folder import open_folder
from regraft.plugins.lora_merge import LoraMerge
from regraft.plugins.lora_merge.params import LoraMergeParams
from tests.families import save_tiny
from tests.materialise import materialise
from tests.plugins.lora_merge.adapters import load_model, make_adapter, merged_by_us

GROWN = 136


def grown_adapter(base, folder, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(base)
        model.resize_token_embeddings(GROWN, mean_resizing=False)
        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **config))
        model.save_pretrained(folder, save_embedding_layers=True)
    return folder


def merged_by_peft(base, adapter):
    """As peft documents it: resize first, then load the adapter, then merge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_model(base)
        model.resize_token_embeddings(GROWN, mean_resizing=False)
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_vocabulary_grows(family, tmp_path):
    base = save_tiny(family, tmp_path / "base")
    adapter = grown_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = merged_by_us(base, adapter)
    assert merged.config["vocab_size"] == GROWN
    assert merged.config["tie_word_embeddings"] is (family == "llama-tied")
    expected = merged_by_peft(base, adapter).state_dict()
    ours = load_model(materialise(merged, tmp_path / "out")).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_both_ends_resized_and_adapted(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    adapter = grown_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    merged, expected = merged_by_us(base, adapter), merged_by_peft(base, adapter).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(merged.load(name), expected[name]), name


@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_one_of_two_tied_ends_adapted_after_resizing(side, tmp_path):
    """The other end is what both were before the training: the copy that peft saves."""
    base = save_tiny("llama-tied", tmp_path / "base")
    adapter = grown_adapter(base, tmp_path / "adapter", target_modules=[side])
    merged = merged_by_us(base, adapter)
    assert merged.config["tie_word_embeddings"] is False
    ends = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    adapted = ends.pop(side)
    (kept,) = ends.values()
    stored = f"base_model.model.{adapted.replace('.weight', '.base_layer.weight')}"
    copy = load_file(adapter / "adapter_model.safetensors")[stored]
    assert torch.equal(merged.load(kept), copy)
    assert merged.specs[adapted].shape == (GROWN, 64)
    assert not torch.equal(merged.load(adapted), copy)


def test_one_end_alone_is_not_enough(tmp_path):
    """peft does not save the resized head if only the embeddings are adapted, so its new rows are lost."""
    base = save_tiny("llama", tmp_path / "base")
    adapter = grown_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    with pytest.raises(InputError, match="1 of the adapter's 3 tensors") as error:
        merged_by_us(base, adapter)
    assert "model.embed_tokens.weight with 136 and lm_head.weight with 128" in error.value.expected


def test_dora_of_resized_embeddings(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    adapter = grown_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"], use_dora=True)
    merged, expected = merged_by_us(base, adapter), merged_by_peft(base, adapter).state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.allclose(merged.load(name), expected[name], rtol=1e-6, atol=1e-7), name


def test_the_adapters_tokenizer_comes_along(tmp_path):
    base = save_tiny("llama", tmp_path / "base", tokenizer=True)
    adapter = grown_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    (adapter / "tokenizer.json").write_text('{"grown": true}')
    patch = LoraMerge().patch(open_folder(base, label="base"), LoraMergeParams(adapter=adapter))
    assert {name: file.read() for name, file in patch.files.items()} == {"tokenizer.json": b'{"grown": true}'}
    assert any("136 rows, with the adapter's tokenizer.json" in note for note in patch.notes)


def test_a_tokenizer_is_left_alone_if_the_vocabulary_stays(tmp_path):
    base = save_tiny("llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "embed_tokens"])
    (adapter / "tokenizer.json").write_text("{}")
    patch = LoraMerge().patch(open_folder(base, label="base"), LoraMergeParams(adapter=adapter))
    assert not patch.files
    assert not patch.json


def test_rows_that_an_earlier_step_gave_to_other_tokens_are_named(tmp_path):
    base = open_folder(save_tiny("llama", tmp_path / "base"), label="base")
    name, head = "model.embed_tokens.weight", "lm_head.weight"
    spec = base.specs[name]
    turned = row_map(name, [[row] for row in reversed(range(spec.rows))])
    below = overlay(base, Patch(edits={name: Edit(spec, turned)}), by="retrofit")

    def noted(checkpoint, *modules):
        adapter = make_adapter(tmp_path / "base", tmp_path / "-".join(modules), target_modules=list(modules))
        patch = LoraMerge().patch(checkpoint, LoraMergeParams(adapter=adapter))
        return [note for note in patch.notes if "trained behind it" in note]

    (note,) = noted(below, "embed_tokens", "lm_head")
    assert name in note
    assert head not in note
    assert not noted(below, "q_proj")
    assert not noted(base, "embed_tokens")
