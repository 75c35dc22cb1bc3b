"""All weights of a checkpoint: the outline of a full training is kept, whatever else the checkpoint stores."""

import json

import pytest
from safetensors.torch import load_file, save_file

from regraft.core.errors import Unsupported
from regraft.core.patch import overlay
from regraft.core.sources.folder import open_folder
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.trained import trained_patch
from regraft.core.training.weights import select
from regraft.core.training.whole import completed, learnable, refuse_quantised
from tests.core.training.support import batches, fit, model_of, sequences
from tests.families import save_tiny
from tests.materialise import materialise

BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"


def extra(folder):
    """The checkpoint with a tied head that is stored all the same, an old buffer, and numbers that are no weights."""
    import torch

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[BUFFER] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_is_no_parameter_stays_and_a_tied_head_follows_its_embedding(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint(extra(save_tiny("llama-tied", tmp_path / "base")))
    model = model_of(tmp_path / "base")
    fit(model, batches(sequences(8), batch_size=4, epochs=2))
    patch = completed(checkpoint, trained_patch(checkpoint, model, select(model)), model)
    assert list(patch.edits) == list(learnable(checkpoint))
    after = overlay(checkpoint, patch, by="step")
    assert torch.equal(after.load("lm_head.weight"), after.load("model.embed_tokens.weight"))
    assert not torch.equal(after.load("lm_head.weight"), checkpoint.load("lm_head.weight"))
    assert torch.equal(after.load(BUFFER), torch.ones(8))
    again = AutoModelForCausalLM.from_pretrained(materialise(after, tmp_path / "out"), dtype=torch.float32)
    ids = torch.tensor([[5, 9, 30, 7]])
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma2", "gpt_neox"])
def test_every_tensor_of_a_family_is_in_the_patch(family, tmp_path):
    """Experts that are stored apart and held together, tied heads, fused projections."""
    checkpoint = open_checkpoint(save_tiny(family, tmp_path))
    model = model_of(tmp_path)
    patch = completed(checkpoint, trained_patch(checkpoint, model, select(model)), model)
    assert {name: edit.spec for name, edit in patch.edits.items()} == learnable(checkpoint)


def test_quantised_weights_are_refused(tmp_path):
    folder = save_tiny("llama", tmp_path)
    refuse_quantised(open_folder(folder, label="base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(Unsupported, match="quantised weights cannot learn"):
        refuse_quantised(open_folder(folder, label="base"))
