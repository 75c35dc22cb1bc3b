"""The generator inside the checkpoint: with an image's features the model is the merged one, without them the base."""

import subprocess
import sys

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
from regraft.plugins.vlora.vision import PROCESSOR
from tests.families import save_tiny, tiny
from tests.materialise import materialise
from tests.plugins.vlora.encoders import picture, save_encoder
from tests.plugins.vlora.generators import (
    edit_json,
    features,
    gpt2_parts,
    hooked_logits,
    llama_parts,
    make_generator,
    vlora,
)
from tests.running import done, recipe_text, regraft, write_recipe

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_sees_beside_quantised_weights(dtype, tmp_path):
    """transformers puts other modules in the place of linear layers after the model has been made."""
    save_tiny("llama", tmp_path / "base", tokenizer=True, dtype=dtype, hidden_size=128, intermediate_size=192)
    make_generator(tmp_path / "base", tmp_path / "g", types="qkvom")
    (tmp_path / "nf4.toml").write_text(recipe_text("base", path=str(tmp_path / "nf4"), quantize="nf4"))
    done("apply", tmp_path / "nf4.toml")
    save_encoder("siglip-vision", tmp_path / "eyes")
    step = {"use": "vlora", "generator": "g", "vision": str(tmp_path / "eyes"), "output": "attached"}
    logits, pixels = {}, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for name, base, form in (
        ("wide", "nf4", {"quantize": "none"}),
        ("kept", "nf4", {}),
        ("new", "base", {"quantize": "nf4"}),
    ):
        write_recipe(tmp_path / f"{name}.toml", base, step, path=str(tmp_path / name), **form)
        done("apply", tmp_path / f"{name}.toml")
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True).eval()
            logits[name] = torch.cat([model(TOKENS, **sight).logits for sight in (
                {"image_features": features()}, {"pixel_values": pixels})])  # fmt: skip
            assert not close(logits[name][:2], model(TOKENS).logits)
        if form != {"quantize": "none"}:
            assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        assert type(model.vlora.vision.encoder.layers[0].mlp.fc1).__name__ == "Linear"
        apart = float((logits[name] - logits["wide"]).norm() / logits["wide"].norm())
        assert apart < 0.1, "bitsandbytes computes in bf16 on some processors"


def test_without_an_encoder_it_takes_features_alone_and_says_so(llama, tmp_path):
    make_generator(llama / "base", tmp_path / "g")
    after, patch = attach(llama / "base", tmp_path, types="qm", scale=0.5)
    assert after.config["vlora"]["scale"] == 1.0
    assert {key[0] for key in after.config["vlora"]["places"]} == {"q", "m"}
    assert any("without them it is the base" in note for note in patch.notes)
    assert any("it takes no pixels, since no vision encoder is known" in note for note in patch.notes)
    assert PROCESSOR not in after.files
    with pytest.raises(ValueError, match="no vision encoder: give image_features in place of pixel_values"):
        load(llama / "out")(TOKENS, pixel_values=torch.zeros(1, 3, 8, 8))


LOOK = """
import sys
sys.modules["regraft"] = None
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

*folders, first, second = sys.argv[1:]
images = [Image.open(path).convert("RGB") for path in (first, second)]
options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/out", trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(f"{folder}/out")
    inputs = processor(images=images, text=["the sea and the land"] * 2, return_tensors="pt")
    assert set(inputs) >= {"input_ids", "attention_mask", "pixel_values"}, set(inputs)
    text = {key: value[:1] for key, value in inputs.items() if key != "pixel_values"}
    merged = AutoModelForCausalLM.from_pretrained(f"{folder}/merged", dtype=torch.float32)
    with torch.no_grad():
        both, blind, right = model(**inputs).logits, model(**text).logits, merged(**text).logits
        features = model.vlora.vision(inputs["pixel_values"][:1], output_hidden_states=True).hidden_states[-2]
        features = features[:, model.config.vlora["leading"] :]
        given = model(**text, image_features=features).logits
    assert torch.equal(model.generate(**inputs, **options)[:1], merged.generate(**text, **options))
    apart = [float((one - right[0]).norm() / right.norm()) for one in (both[0], given[0], both[1], blind[0])]
    assert max(apart[:2]) < 1e-5 < 1e-4 < min(apart[2:]), (folder, apart)
"""


def test_pixels_at_run_time_are_the_merged_checkpoint_of_the_same_image(tmp_path):
    """Two images at once, in a process that has no regraft; the second row's is another one."""
    images = [picture(tmp_path / f"{seed}.png", seed=seed) for seed in (0, 1)]
    kinds = [tmp_path / "clip", tmp_path / "siglip-vision"]
    for root in kinds:
        save_tiny("llama", root / "base", tokenizer=True)
        save_encoder(root.name, root / "eyes")
        make_generator(root / "base", root / "g")
        step = {"use": "vlora", "generator": "g", "vision": str(root / "eyes")}
        for name, more in (("out", {"output": "attached"}), ("merged", {"output": "merged", "image": str(images[0])})):
            write_recipe(root / f"{name}.toml", "base", {**step, **more}, path=str(root / name))
        plan = done("plan", root / "out.toml", "--json").json
        for name in ("out", "merged"):
            done("apply", root / f"{name}.toml")
        sizes = {name: (root / "out" / name).stat().st_size for name in (*plan["weight_files"], *plan["files"])}
        assert sizes == {**plan["weight_files"], **plan["files"]}
        assert any("its vision encoder" in note for note in plan["steps"][0]["notes"])
        written = open_folder(root / "out", label="out")
        assert str(tmp_path) not in f"{written.json('config.json')}{written.json(PROCESSOR)}"
        assert check_structure(written, regraft_architectures()) == []
        for name in ("base", "eyes", "g"):
            (root / name).rename(root / f"{name}.gone")
    command = [sys.executable, "-I", "-W", "ignore", "-c", LOOK, *kinds, *images]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def no_processor(folder):
    (folder / PROCESSOR).unlink()


def pixels_of_another_size(folder):
    edit_json(folder / PROCESSOR, crop_size={"height": 12, "width": 12})


def fewer_layers(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)


def other_width(folder):
    save_encoder("clip-vision", folder, hidden_size=16)


EYES = {
    "no processor": (no_processor, "has no image processor"),
    "another size": (pixels_of_another_size, "does not fit the encoder"),
    "fewer layers": (fewer_layers, "do not fit its config"),
    "another width": (other_width, "is not that of the generator"),
}


@pytest.mark.parametrize("fault", EYES)
def test_an_encoder_that_would_not_see_is_refused(fault, tmp_path):
    damage, words = EYES[fault]
    save_tiny("llama", tmp_path / "base", tokenizer=True)
    save_encoder("clip-vision", tmp_path / "eyes")
    make_generator(tmp_path / "base", tmp_path / "g", vision_tower=str(tmp_path / "eyes"))
    damage(tmp_path / "eyes")
    step = {"use": "vlora", "generator": "g", "output": "attached"}
    ran = regraft("apply", write_recipe(tmp_path / "r.toml", "base", step, path=str(tmp_path / "out")))
    assert ran.code == 3
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["mixtral", "gemma3", "gpt_neox"])
def test_families_that_it_cannot_be_attached_to(family, tmp_path):
    base = save_tiny(family, tmp_path / "base")
    make_generator(base, tmp_path / "g", types="qkvo")
    with pytest.raises(Unsupported, match="cannot be attached") as caught:
        attach(base, tmp_path)
    assert 'output = "merged"' in str(caught.value)
