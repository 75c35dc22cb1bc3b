"""Low-rank factors that learn beside the new rows: as peft has them, and merged without a trace."""

import json

import pytest
import torch

from regraft.core.errors import Unsupported
from regraft.core.patch import Patch, overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.body import Body
from regraft.plugins.tokenizer_retrofit.params import BodySettings
from tests.families import save_tiny
from tests.materialise import materialise
from tests.plugins.tokenizer_retrofit import toys

FAMILIES = [("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("gpt2", {}), ("phi3", {})]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "nl.txt"
    path.write_text(toys.DUTCH)
    return path


def settings(**values):
    return BodySettings.model_validate_json(json.dumps(values), strict=True)


def filled(checkpoint, given):
    """A model with factors in which something was learnt."""
    model = Run("x").model(checkpoint)
    body = Body(model, checkpoint, given, seed=3)
    for number, pair in enumerate(body.pairs.values()):
        torch.nn.init.normal_(pair.B, std=0.2, generator=torch.Generator().manual_seed(number))
    return model, body


@pytest.mark.parametrize(("family", "options"), FAMILIES)
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "up_proj", "down_proj")])
def test_merged_weights_compute_what_the_factors_did_and_what_peft_does(tmp_path, family, options, targets):
    from peft import LoraConfig, get_peft_model

    save_tiny(family, tmp_path, **options)
    checkpoint = open_checkpoint(tmp_path)
    given = settings(rank=3, alpha=6, targets=targets)
    model, body = filled(checkpoint, given)
    plain = model(IDS).logits
    with body.attached():
        beside = model(IDS).logits
    assert not torch.allclose(beside, plain, atol=1e-2)
    assert torch.equal(model(IDS).logits, plain)
    after = overlay(checkpoint, Patch(edits=body.edits()), by="x")
    merged = Run("x").model(after)(IDS).logits
    torch.testing.assert_close(merged, beside, atol=1e-4, rtol=1e-4)
    assert body.merge() < 1e-3
    assert torch.equal(model(IDS).logits, merged)

    names = {name.removesuffix(".weight"): pair for name, pair in body.pairs.items()}
    own = Run("x").model(checkpoint)
    paths = {pair.slot.module: pair for pair in names.values()}
    reference = get_peft_model(own, LoraConfig(r=3, lora_alpha=6, target_modules=list(paths)))
    for path, pair in paths.items():
        layer = reference.get_submodule(f"base_model.model.{path}")
        with torch.no_grad():
            layer.lora_A.default.weight.copy_(pair.A)
            layer.lora_B.default.weight.copy_(pair.B)
    torch.testing.assert_close(reference.eval()(IDS).logits, beside, atol=1e-4, rtol=1e-4)


def test_factors_begin_as_pefts_do_and_have_its_defaults(tmp_path):
    from peft import LoraConfig, get_peft_model

    save_tiny("llama", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    theirs = get_peft_model(Run("x").model(checkpoint), LoraConfig())
    names = {
        name.removeprefix("base_model.model.").split(".lora_")[0] for name, _ in theirs.named_parameters()
        if "lora_A" in name
    }  # fmt: skip
    body = Body(Run("x").model(checkpoint), checkpoint, BodySettings(), seed=3)
    assert {pair.slot.module for pair in body.pairs.values()} == names
    config = theirs.peft_config["default"]
    assert (BodySettings().rank, BodySettings().alpha) == (config.r, config.lora_alpha)
    bound = max(float(weight.detach().abs().max()) for name, weight in theirs.named_parameters() if "lora_A" in name)
    A = torch.cat([pair.A.detach().flatten() for pair in body.pairs.values()])
    assert 0.95 * bound < float(A.abs().max()) <= 64**-0.5
    assert float(A.std()) == pytest.approx(64**-0.5 / 3**0.5, rel=0.05)
    assert not any(bool(pair.B.any()) for pair in body.pairs.values())


@pytest.mark.parametrize(("family", "options"), FAMILIES[:3])
def test_rows_and_body_learn_together_and_the_result_is_stock(tmp_path, corpus, family, options):
    from transformers import AutoModelForCausalLM

    folder = toys.save(family, tmp_path / "base", **options)
    adapt = {"steps": 12, "tokens": 64, "lr": 0.01, "epochs": 4, "warmup_steps": 1, "precision": "float32"}
    body = {"rank": 4, "targets": ["q_proj", "v_proj", "o_proj", "up_proj"]}
    rows = toys.retrofit(folder, corpus, adapt=adapt, held_out=corpus)[2]
    before, after, patch = toys.retrofit(folder, corpus, adapt={**adapt, "body": body}, held_out=corpus)
    assert patch.metrics["bpb_initial"] == rows.metrics["bpb_initial"]
    assert patch.metrics["bpb_adapted"] < rows.metrics["bpb_adapted"]
    count = before.config["vocab_size"]
    for name in patch.edits:
        old, new = before.load(name), after.load(name)
        if name in rows.edits:
            assert torch.equal(old, new[:count])
        else:
            assert (new - old).abs().max() > 1e-3
    assert len(patch.edits) == len(rows.edits) + patch.metrics["adapt"]["body"]["weights"]
    loaded = AutoModelForCausalLM.from_pretrained(materialise(after, tmp_path / "out")).eval()
    assert torch.equal(loaded(IDS).logits, Run("x").model(after)(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_factors_of_no_weight_leave_the_rows_as_they_learn_alone(tmp_path, corpus, tied):
    folder = toys.save("llama", tmp_path / "base", tie_word_embeddings=tied)
    adapt = {"steps": 5, "tokens": 64, "lr": 0.01, "precision": "float32"}
    _, alone, _ = toys.retrofit(folder, corpus, adapt=adapt)
    before, after, patch = toys.retrofit(folder, corpus, adapt={**adapt, "body": {"alpha": 0}})
    for name in patch.edits:
        assert torch.equal(after.load(name), alone.load(name))
    assert torch.equal(after.load("model.layers.0.self_attn.q_proj.weight"),
                       before.load("model.layers.0.self_attn.q_proj.weight"))  # fmt: skip


def test_a_body_that_did_not_help_keeps_its_bits(tmp_path, corpus):
    folder = toys.save("llama", tmp_path / "base")
    adapt = {"steps": 6, "tokens": 64, "lr": 30.0, "warmup_steps": 0, "precision": "float32", "body": {}}
    before, after, patch = toys.retrofit(folder, corpus, adapt=adapt, held_out=corpus)
    assert any("did not help" in note for note in patch.notes)
    body = [name for name in patch.edits if "self_attn" in name]
    assert len(body) == 4
    assert all(torch.equal(before.load(name), after.load(name)) for name in body)


def test_a_vocabulary_without_new_tokens_learns_nothing_and_says_so(tmp_path, corpus):
    folder = toys.save("llama", tmp_path / "base")
    options = {"vocabulary": "trim", "size": None, "min_count": None, "adapt": {"body": {}}}
    before, after, patch = toys.retrofit(folder, corpus, **options)
    assert "no token is new, so nothing was learnt" in patch.notes
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(before.load(name), after.load(name))


def test_bits_per_byte_are_those_of_the_weights_as_they_are_stored(tmp_path, corpus):
    from regraft.core.training.head import Head
    from regraft.plugins.tokenizer_retrofit.bits import bits_per_byte
    from regraft.plugins.tokenizer_retrofit.passages import passage_bytes, passages

    folder = toys.save("llama", tmp_path / "base")
    checkpoint = open_checkpoint(folder)
    model = Run("x").model(checkpoint).bfloat16()
    model.save_pretrained(folder)
    adapt = {"steps": 8, "tokens": 64, "lr": 0.003, "precision": "float32", "body": {"rank": 4}}
    _, after, patch = toys.retrofit(folder, corpus, adapt=adapt, held_out=corpus)
    assert 0.0 < patch.metrics["adapt"]["body"]["lost_to_rounding"] < 1.0
    run = Run("x")
    found = bits_per_byte(Head.of(run.model(after)), run.tokenizer(after),
                          passages([toys.DUTCH], nbytes=passage_bytes(after)), "cpu")  # fmt: skip
    assert patch.metrics["bpb_adapted"] == pytest.approx(found, abs=2e-4)


@pytest.mark.parametrize(("family", "target"), [("gpt2", "gate_proj"), ("mixtral", "up_proj")])
def test_projections_that_a_model_lacks_are_named(tmp_path, family, target):
    save_tiny(family, tmp_path)
    with pytest.raises(Unsupported, match=f"module of its own(.|\n)*found: {target}"):
        Body(None, open_checkpoint(tmp_path), settings(targets=[target]), 0)
