"""From trained parameters to tensors of the checkpoint, in every family."""

import json

import pytest
import torch

from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.load import load_data
from regraft.core.data.settings import DataSettings
from regraft.core.errors import Unsupported
from regraft.core.operations import ComputedTensor
from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.model import materialise_model, window_of
from regraft.core.training.trained import trained_patch
from regraft.core.transformation import Run
from tests.checkpoints import same_bits
from tests.core.training.support import fit, model_of
from tests.families import FAMILIES
from tests.materialise import materialise

ALL = [*FAMILIES, "gemma3", "starcoder2", "qwen2-tied", "mixtral-tied", "gpt2-untied"]


def loaded(checkpoint):
    return {name: tensor.load() for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize("family", ALL)
def test_parameters_go_back_under_their_names(family, tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    base = open_checkpoint(tiny_folder(family, tokenizer=False))
    model = materialise_model(base)
    names = [name for name, _ in model.named_parameters()]

    untouched = trained_patch(base, model, names)
    assert set(untouched.edits) == set(base.specs)
    assert untouched.metrics["changed_tensors"] == 0
    same = overlay(base, untouched, by="x")
    assert all(same.raw(name) == base.raw(name) is not None for name in base.specs), "copied as they stand"

    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * 0.01 * (number + 1))
    result = overlay(base, trained_patch(base, model, names), by="x")
    assert dict(result.specs) == dict(base.specs)
    stock = AutoModelForCausalLM.from_pretrained(materialise(result, tmp_path / "out"), dtype=torch.float32)
    trained = dict(model.named_parameters())
    assert same_bits({name: one.detach() for name, one in stock.named_parameters()},
                     {name: one.detach() for name, one in trained.items()})  # fmt: skip


def test_only_named_tensors_are_edited_and_dtype_is_kept(tiny_folder):
    base = open_checkpoint(tiny_folder("llama", dtype=torch.bfloat16, tokenizer=False))
    model = materialise_model(base)
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    with torch.no_grad():
        model.get_parameter(names[0]).add_(0.5)
        model.get_parameter(names[1]).mul_(1 + 1e-6)  # below the rounding of bfloat16
        model.get_parameter("model.norm.weight").add_(1)
    patch = trained_patch(base, model, names)
    assert patch.metrics == {"trained_tensors": 2, "changed_tensors": 1}
    result = overlay(base, patch, by="x")
    assert result.specs[names[0]].dtype == "BF16"
    assert torch.equal(result.load(names[0]), model.get_parameter(names[0]).to(torch.bfloat16))
    changed = [name for name in base.specs if result.raw(name) != base.raw(name)]
    assert changed == [names[0]]
    assert isinstance(result.tensors[names[0]], ComputedTensor)


def test_the_patch_holds_a_copy(llama):
    base = open_checkpoint(llama)
    model = materialise_model(base)
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
        patch = trained_patch(base, model, ["model.norm.weight"])
        model.model.norm.weight.fill_(3.0)
    assert overlay(base, patch, by="x").load("model.norm.weight").unique().tolist() == [2.0]


def test_a_head_that_alone_is_stored_takes_the_tied_embeddings(tiny_folder, tmp_path):
    base = open_checkpoint(tiny_folder("qwen2-tied", tokenizer=False))
    tensors = loaded(base)
    from tests.checkpoints import write_checkpoint

    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    only_head = open_checkpoint(write_checkpoint(tmp_path / "base", tensors, config=dict(base.config)))
    model = materialise_model(only_head)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    patch = trained_patch(only_head, model, ["model.embed_tokens.weight"])
    assert list(patch.edits) == ["lm_head.weight"]
    assert torch.equal(overlay(only_head, patch, by="x").load("lm_head.weight"), tensors["lm_head.weight"] + 1)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_go_back(llama, tiny_folder):
    base = open_checkpoint(llama)
    model = model_of(llama)
    with pytest.raises(Unsupported, match="cannot be trained"):
        trained_patch(base, model, ["model.none.weight"])
    model.register_parameter("adapter", torch.nn.Parameter(torch.zeros(3)))
    with pytest.raises(Unsupported, match="no tensor of the checkpoint"):
        trained_patch(base, model, ["adapter"])
    quantised = model_of(tiny_folder("llama", intermediate_size=128, tokenizer=False), quantize="nf4")
    with pytest.raises(Unsupported, match="cannot be trained"):
        trained_patch(base, quantised, ["model.layers.0.mlp.up_proj.weight"])


def test_from_a_file_to_a_patch(llama, tmp_path):
    """Data, model, loop and patch together: what was learnt is in the checkpoint, and in the named tensors alone."""
    base, run = open_checkpoint(llama), Run("tune")
    (tmp_path / "data.jsonl").write_text("".join(
        json.dumps({"prompt": f"{n} and {n} is", "completion": f" {2 * n}."}) + "\n" for n in range(20)
    ))  # fmt: skip
    model, tokenizer = run.model(base), run.tokenizer(base)
    settings = DataSettings(source=str(tmp_path / "data.jsonl"))
    data = load_data(settings, tokenizer, window=window_of(base, model), seed=run.seed_for("data"))
    names = [name for name, _ in model.named_parameters() if ".mlp." in name]
    made = Batches(data.examples, BatchSettings(batch_size=4, epochs=6), run.seed_for("order"))
    report = fit(model, made, names=names, lr=5e-3)
    result = overlay(base, trained_patch(base, model, names), by="tune")
    assert {name for name in base.specs if result.raw(name) != base.raw(name)} == set(names)
    again = fit(run.model(result), made, lr=0.0, names=names)
    assert again.losses[0] < 0.5 * report.losses[0]
