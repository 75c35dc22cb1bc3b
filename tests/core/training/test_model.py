"""A checkpoint's model without a folder: the same numbers as from one, and every misfit refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from regraft.core.checkpoint import FileRef
from regraft.core.errors import InputError, ResourceError, Unsupported
from regraft.core.operations import ScaleRows, Value
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.tensors import MemoryTensor
from regraft.core.training.model import materialise_model, materialise_tokenizer, memory, window_of
from regraft.core.transformation import Run
from tests.core.training.support import batches, fit, model_of, sequences
from tests.families import FAMILIES, tiny

IDS = torch.arange(4, 20)[None]


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", "starcoder2", "qwen2-tied"])
def test_logits_are_those_of_the_saved_model(family, tiny_folder):
    model = model_of(tiny_folder(family, tokenizer=False))
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, tiny(family)(IDS).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_an_overlay_is_seen_and_never_changed(llama):
    base = open_checkpoint(llama)
    name = "model.norm.weight"
    brought = base.load(name) * 2
    doubled = overlay(base, Patch(edits={name: Edit(base.specs[name], Value(MemoryTensor(name, brought)))}), by="x")
    factors = MemoryTensor("factors", torch.full((64,), 2.0))
    scaled = overlay(base, Patch(edits={name: Edit(base.specs[name], ScaleRows(name, factors))}), by="x")
    kept = brought.clone()
    model = materialise_model(doubled)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, materialise_model(scaled)(IDS).logits)
        assert not torch.equal(model(IDS).logits, model_of(llama)(IDS).logits)
    fit(model, batches(sequences(8)), lr=1.0)
    assert torch.equal(brought, kept), "training must not reach the step's own tensor"
    assert not torch.equal(model.model.norm.weight, kept)


def test_dtype_and_label(llama):
    model = model_of(llama, dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert str(llama) in model.name_or_path
    assert window_of(open_checkpoint(llama), model) == 128


def changed(llama, tmp_path, **config):
    folder = shutil.copytree(llama, tmp_path / "base")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attention_bias": True}, "has tensors that the checkpoint lacks"),
        ({"num_hidden_layers": 1}, "does not know"),
        ({"intermediate_size": 80}, "another shape"),
        ({"model_type": "nothing"}, "transformers does not read the config"),
    ],
)
def test_tensors_that_do_not_fit(llama, tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        materialise_model(open_checkpoint(changed(llama, tmp_path, **config)))


def test_no_class_that_predicts_tokens(llama, tmp_path):
    config = FileRef(data=json.dumps({"model_type": "siglip_vision_model"}).encode())
    base = open_checkpoint(llama)
    with pytest.raises(Unsupported, match="no class for this model"):
        materialise_model(replace(base, files={**base.files, "config.json": config}))


CODE = """
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = -outputs.logits
        return outputs
"""


def test_code_of_a_checkpoint_runs_only_if_trusted(llama, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = changed(llama, tmp_path, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (folder / "modeling_own.py").write_text(CODE)
    base = open_checkpoint(folder)
    stock, own = materialise_model(base), materialise_model(base, trust_remote_code=True)
    assert (type(stock).__name__, type(own).__name__) == ("LlamaForCausalLM", "OwnForCausalLM")
    with torch.no_grad():
        assert torch.equal(own(IDS).logits, -stock(IDS).logits)


def test_an_attention_that_stock_lacks_is_refused(llama, tmp_path):
    with pytest.raises(Unsupported, match="cannot build the model"):
        materialise_model(open_checkpoint(changed(llama, tmp_path, attn_implementation="of_someone_else")))


@pytest.mark.parametrize(("quantize", "error"), [("nf4", 0.5), ("int8", 0.1)])
@pytest.mark.filterwarnings("ignore")
def test_quantised(tiny_folder, quantize, error):
    folder = tiny_folder("llama", intermediate_size=128, tokenizer=False)
    plain, model = model_of(folder), model_of(folder, quantize=quantize)
    assert "4bit" in type(model.model.layers[0].mlp.up_proj).__name__ or quantize == "int8"
    assert not model.model.layers[0].mlp.up_proj.weight.is_floating_point()
    with torch.no_grad():
        exact = plain(IDS).logits
        relative = (model(IDS).logits - exact).norm() / exact.norm()
    assert 1e-4 < relative < error


def test_gradient_checkpointing_changes_no_gradient(llama):
    gradients = []
    for checkpointing in (False, True):
        model = model_of(llama, gradient_checkpointing=checkpointing).train().requires_grad_(True)
        model(IDS).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == checkpointing
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_generation_config(llama):
    base = open_checkpoint(llama)
    settings = FileRef(data=b'{"eos_token_id": [2, 5], "temperature": 0.5, "do_sample": true}')
    model = materialise_model(replace(base, files={**base.files, "generation_config.json": settings}))
    assert model.generation_config.eos_token_id == [2, 5]


def test_tokenizer_of_an_overlay(llama):
    base = open_checkpoint(llama)
    files = {"chat_template.jinja": FileRef(data=b"{% for m in messages %}[{{ m['content'] }}]{% endfor %}")}
    above = overlay(base, Patch(files=files), by="x")
    tokenizer = Run("x").tokenizer(above)
    assert tokenizer("ab")["input_ids"] == materialise_tokenizer(base)("ab")["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"
    bare = replace(base, files={"config.json": base.files["config.json"]})
    with pytest.raises(InputError, match="no tokenizer"):
        materialise_tokenizer(bare)


def test_run_gives_a_model(llama):
    model = Run("x", device="cpu").model(open_checkpoint(llama), dtype="bfloat16")
    assert model.dtype == torch.bfloat16


def test_out_of_memory_names_the_knobs():
    with pytest.raises(ResourceError, match="out of memory while training") as caught, memory("training"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert "micro_batch" in caught.value.remedy
    with pytest.raises(ResourceError), memory("training"):
        torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="something else"), memory("training"):
        raise RuntimeError("something else")


def test_plan_imports_nothing_heavy():
    code = (
        "import sys; import regraft.core.transformation, regraft.core.training\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
