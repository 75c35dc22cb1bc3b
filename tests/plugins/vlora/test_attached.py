"""The generator inside the checkpoint: with an image's features the model is the merged one, without them the base."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from regraft.core.errors import Unsupported
from regraft.core.patch import overlay
from regraft.core.portable_code import prove
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.core.verify.structure import check_structure
from regraft.plugins.vlora import Vlora, regraft_architectures
from regraft.plugins.vlora.params import VloraParams
from tests.families import save_tiny, tiny
from tests.materialise import materialise
from tests.plugins.vlora.generators import (
    features,
    gpt2_parts,
    hooked_logits,
    llama_parts,
    make_generator,
    vlora,
)
from tests.running import done, recipe_text

TOKENS = torch.tensor([[1, 5, 9, 77, 33, 120], [1, 8, 2, 64, 99, 3]])


def attach(base, folder, **params):
    checkpoint = open_folder(base, label="base")
    given = VloraParams(generator=folder / "g", output="attached", **params)
    outline, patch = Vlora().plan(checkpoint, given), Vlora().apply(checkpoint, given, Run("vlora"))
    assert not outline.deviations(patch)
    return overlay(checkpoint, patch, by="vlora"), patch


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def close(one, other):
    return float((one - other).norm() / other.norm()) < 1e-5


FAMILIES = {"llama": (llama_parts, "qkvom"), "qwen3": (llama_parts, "qkvom"), "gemma3_text": (llama_parts, "om"),
            "gpt2": (gpt2_parts, "vkqo")}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights_sep", [True, False], ids=["separate", "shared"])
def test_every_row_sees_its_own_image(family, weights_sep, tmp_path):
    parts, types = FAMILIES[family]
    base = save_tiny(family, tmp_path / "base")
    generator = make_generator(base, tmp_path / "g", types=types, weights_sep=weights_sep)
    after, _ = attach(base, tmp_path)
    model, seen = load(materialise(after, tmp_path / "out")), features(count=2)
    with torch.no_grad():
        both, plain = model(TOKENS, image_features=seen).logits, model(TOKENS).logits
        stock = tiny(family)(TOKENS).logits
    assert torch.equal(plain, stock)
    for row in range(2):
        expected = hooked_logits(tiny(family), generator, seen[row : row + 1], TOKENS[row : row + 1], parts)
        assert close(both[row], expected[0])
        assert not close(both[row], stock[row])
    assert check_structure(open_folder(tmp_path / "out", label="out"), regraft_architectures()) == []


@pytest.mark.parametrize("family", ["phi3", "falcon", "glm4", "cohere2", "granite-biased"])
def test_other_layouts_compute_what_the_merged_model_does(family, tmp_path):
    base = save_tiny(family, tmp_path / "base")
    make_generator(base, tmp_path / "g", types="qkvo")
    after, _ = attach(base, tmp_path)
    merged = materialise(vlora(base, tmp_path / "g", tmp_path)[1], tmp_path / "merged")
    with torch.no_grad():
        found = load(materialise(after, tmp_path / "out"))(TOKENS, image_features=features()).logits
        assert close(found, AutoModelForCausalLM.from_pretrained(merged)(TOKENS).logits)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder with everything of a llama."""
    folder = tmp_path_factory.mktemp("llama")
    base = save_tiny("llama", folder / "base")
    make_generator(base, folder / "g")
    materialise(attach(base, folder)[0], folder / "out")
    materialise(vlora(base, folder / "g", folder)[1], folder / "merged")
    return folder


def test_generate_writes_what_the_merged_model_writes(llama):
    model = load(llama / "out")
    merged = AutoModelForCausalLM.from_pretrained(llama / "merged")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(TOKENS)}
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        theirs = merged.generate(TOKENS, **options, **more)
        ours = model.generate(TOKENS, image_features=features(count=1).repeat(2, 1, 1), **options, **more)
        assert torch.equal(ours, theirs)
    assert not torch.equal(model.generate(TOKENS, **options), merged.generate(TOKENS, **options))
    with model.seeing(features()):
        assert torch.equal(model.generate(TOKENS, **options), model.generate(TOKENS, **options))
    assert model._seen == []


def test_wrong_features_are_refused_and_forgotten(llama):
    model = load(llama / "out")
    with pytest.raises(ValueError, match=r"image_features are \[batch, 4, 12\], not \[1, 5, 12\]"):
        model(TOKENS, image_features=torch.zeros(1, 5, 12))
    with pytest.raises(ValueError, match="2 rows of text and features of 3 images"):
        model(TOKENS, image_features=torch.zeros(3, 4, 12))
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, tiny("llama")(TOKENS).logits)


def test_it_needs_its_code_and_nothing_else(llama):
    proof = prove(llama / "out")
    assert proof.ok, proof.error
    assert proof.report["class"] == "VloraForCausalLM"
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(llama / "out", trust_remote_code=False)


def test_it_sees_beside_quantised_weights(tmp_path):
    """transformers puts other modules in the place of linear layers after the model has been made."""
    save_tiny("llama", tmp_path / "base", tokenizer=True, hidden_size=128, intermediate_size=192)
    make_generator(tmp_path / "base", tmp_path / "g", types="qkvom")
    (tmp_path / "nf4.toml").write_text(recipe_text("base", path=str(tmp_path / "nf4"), quantize="nf4"))
    done("apply", tmp_path / "nf4.toml")
    step = {"use": "vlora", "generator": "g", "output": "attached"}
    logits = {}
    for name, form in (("kept", {}), ("wide", {"quantize": "none"})):
        (tmp_path / f"{name}.toml").write_text(recipe_text("nf4", step, path=str(tmp_path / name), **form))
        done("apply", tmp_path / f"{name}.toml")
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
            logits[name] = model(TOKENS, image_features=features()).logits
            assert not close(logits[name], model(TOKENS).logits)
    apart = float((logits["kept"] - logits["wide"]).norm() / logits["wide"].norm())
    assert apart < 0.1, "bitsandbytes computes in bf16 on some processors"


def test_no_path_of_the_trainer_goes_along(llama, tmp_path):
    for tower, kept in (("openai/clip-vit-large-patch14-336", True), ("/home/me/clip", False)):
        make_generator(llama / "base", tmp_path / "g", vision_tower=tower)
        after, patch = attach(llama / "base", tmp_path, types="qm", scale=0.5)
        assert after.config["vlora"].get("vision_tower") == (tower if kept else None)
        assert after.config["vlora"]["scale"] == 1.0
        assert {key[0] for key in after.config["vlora"]["places"]} == {"q", "m"}
        assert any("without them it is the base" in note for note in patch.notes)


@pytest.mark.parametrize("family", ["mixtral", "gemma3", "gpt_neox"])
def test_families_that_it_cannot_be_attached_to(family, tmp_path):
    base = save_tiny(family, tmp_path / "base")
    make_generator(base, tmp_path / "g", types="qkvo")
    with pytest.raises(Unsupported, match="cannot be attached") as caught:
        attach(base, tmp_path)
    assert 'output = "merged"' in str(caught.value)
