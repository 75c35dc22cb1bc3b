"""`vlora` in a recipe: from an image file to a checkpoint, and everything that stops it before anything is written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.plugins.vlora.vision import open_tower
from tests.checkpoints import read_all, same_bits
from tests.families import save_tiny
from tests.helpers import names, run_python
from tests.plugins.vlora.encoders import picture, save_encoder
from tests.plugins.vlora.generators import edit_json, features, make_generator, save_features
from tests.plugins.vlora.test_images import png_header
from tests.running import done, regraft, tree, write_recipe


@pytest.fixture
def bench(tmp_path):
    """A folder with a base, an encoder, a generator for both, an image and features."""
    save_tiny("llama", tmp_path / "base", tokenizer=True)
    save_encoder("clip", tmp_path / "eyes")
    make_generator(tmp_path / "base", tmp_path / "g", vision_tower=str(tmp_path / "eyes"))
    picture(tmp_path / "cat.png")
    save_features(tmp_path / "features.safetensors")
    return tmp_path


def recipe(bench, name="r", **step):
    """A recipe for a checkpoint, unless `step` says otherwise."""
    step = {"use": "vlora", "generator": "g", "output": "merged", **step}
    return write_recipe(bench / f"{name}.toml", "base", step, path=str(bench / name))


def test_an_image_is_baked_in(bench):
    ran = done("apply", recipe(bench, image="cat.png"))
    lock = json.loads((bench / "r" / "regraft.lock.json").read_text())["steps"][0]
    assert lock["metrics"]["images"] == ["cat.png"]
    assert lock["metrics"]["types"] == "qkvom"
    assert set(lock["data"]["generator"]) == {"config.json", "model.safetensors"}
    assert str(bench) not in json.dumps(lock)
    assert "the image is baked in: it acts on every token of every prompt" in (bench / "r" / "README.md").read_text()
    assert set(json.loads((bench / "r" / "regraft" / "vlora" / "deltas.json").read_text())) == {
        f"model.layers.1.self_attn.{letter}_proj.weight" for letter in "qkvo"
    }
    assert "r" in ran.out
    # the features that an encoder would give make the same bytes
    seen = open_tower(str(bench / "eyes")).load()(bench / "cat.png")
    save_features(bench / "seen.safetensors", {"cat": seen})
    done("apply", recipe(bench, "again", features="seen.safetensors"))
    assert same_bits(read_all(bench / "r"), read_all(bench / "again"))
    other = picture(bench / "dog.png", seed=1)
    done("apply", recipe(bench, "dog", image=other.name, vision=str(bench / "eyes")))
    assert not same_bits(read_all(bench / "r"), read_all(bench / "dog"))


def test_the_plan_imports_no_torch_and_tells_the_cost(bench):
    program = """
        import sys
        from regraft.core.sources.folder import open_folder
        from regraft.plugins.vlora import Vlora
        from regraft.plugins.vlora.params import VloraParams
        from pathlib import Path
        folder = Path(sys.argv[1])
        params = VloraParams(generator=folder / "g", image=folder / "cat.png", vision=str(folder / "eyes"))
        outline = Vlora().plan(open_folder(folder / "base", label="base"), params)
        assert not {"torch", "transformers"} & set(sys.modules)
        print(outline.workspace_bytes, *outline.notes, sep="; ")
    """
    told = run_python(program, bench)
    count = sum(tensor.numel() for tensor in load_file(bench / "g" / "model.safetensors").values())
    assert int(told.split(";")[0]) > 4 * count
    assert f"made by a generator of {count} parameters" in told


def small(bench, name, **output):
    """A recipe with the step as it is by default, but without type m."""
    step = {"use": "vlora", "generator": "g", "types": "qkvo", "image": "cat.png"}
    return write_recipe(bench / f"{name}.toml", "base", step, path=str(bench / name), **output)


def test_with_nothing_said_an_adapter_is_written(bench):
    file = small(bench, "a")
    plan = done("plan", file).out
    assert "a PEFT adapter of 4 modules" in plan
    assert "step vlora asks for this form, adapter" in plan
    assert "PeftModel" in done("apply", file).out
    assert not (bench / "a" / "config.json").exists()
    assert json.loads((bench / "a" / "regraft.lock.json").read_text())["recipe"]["output"]["format"] == "adapter"
    config = json.loads((bench / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    tensors = load_file(bench / "a" / "adapter_model.safetensors")
    generator = load_file(bench / "g" / "model.safetensors")
    down = tensors["base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"]
    assert torch.equal(down, generator["B.k"][0])
    done("apply", small(bench, "said", format="adapter"))
    assert tree(bench / "said")["adapter_model.safetensors"] == tree(bench / "a")["adapter_model.safetensors"]


def test_the_step_or_the_output_says_checkpoint(bench):
    step = {"use": "vlora", "generator": "g", "image": "cat.png"}
    for name, more, output in (("one", {"output": "merged"}, {}), ("two", {}, {"format": "checkpoint"})):
        done("apply", write_recipe(bench / f"{name}.toml", "base", {**step, **more}, path=str(bench / name), **output))
    assert same_bits(read_all(bench / "one"), read_all(bench / "two"))
    assert "step vlora asks for this form, checkpoint" in done("plan", bench / "one.toml").out
    both = {"use": "vlora", "generator": "g", "image": "cat.png", "types": "qkvo", "output": "merged"}
    file = write_recipe(bench / "said.toml", "base", both, path=str(bench / "said"), format="adapter")
    assert "a PEFT adapter of 4 modules" in done("apply", file).out


LONGER = {"id": "longer", "use": "context-extension", "method": "abf", "target_length": 4096}
SECOND = {"id": "second", "use": "vlora", "generator": "g", "image": "cat.png", "types": "qkvo", "output": "merged"}
CONTRADICTIONS = {
    "type m": ({"types": "qm"}, [], {}, 1, "step vlora: an adapter cannot hold this change", 'output = "merged"'),
    "type m, said": ({}, [], {"format": "adapter"}, 1, "type m, a path beside the whole MLP", 'types = "qkvo"'),
    "more than deltas": ({}, [LONGER], {}, 1, "step longer: config.json: an adapter cannot hold this change",
                         'step vlora asks for an adapter: set [output] format = "checkpoint"'),
    "two wishes": ({}, [SECOND], {}, 2, "the steps ask for different outputs", "vlora: adapter, second: checkpoint"),
    "a key of checkpoints": ({}, [], {"quantize": "nf4"}, 2, "quantize is for whole checkpoints",
                             "step vlora asks for an adapter"),
    "attached": ({"output": "attached"}, [], {"format": "adapter"}, 1, "an adapter cannot hold this change",
                 "a tensor is added"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_an_adapter_that_cannot_be_is_refused_by_name(case, bench):
    step, more, output, code, words, remedy = CONTRADICTIONS[case]
    types = {} if case == "type m, said" else {"types": "qkvo"}
    image = {} if "output" in step else {"image": "cat.png"}
    step = {"use": "vlora", "generator": "g", **image, **types, **step}
    ran = regraft("apply", write_recipe(bench / "r.toml", "base", step, *more, path=str(bench / "r"), **output))
    assert ran.code == code, ran.err
    assert words in ran.err
    assert remedy in ran.err
    assert not (bench / "r").exists()


def test_an_adapter_is_verified_by_its_structure(bench):
    ran = regraft("apply", small(bench, "a"), "--verify", "load")
    assert ran.code == 2
    assert "an adapter is verified by its structure alone" in ran.err


def test_a_quantised_base_takes_an_adapter(bench):
    """Which needs no requantising: the remedy where merging would lose the delta."""
    done("apply", write_recipe(bench / "n.toml", "base", path=str(bench / "nf4"), quantize="nf4"))
    step = {"use": "vlora", "generator": "g", "types": "qkvo", "image": "cat.png"}
    done("apply", write_recipe(bench / "a.toml", "nf4", step, path=str(bench / "a")))
    done("apply", small(bench, "b"))
    one, two = (load_file(bench / name / "adapter_model.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    merged = {**step, "output": "merged", "scale": 0.001}
    ran = regraft("apply", write_recipe(bench / "m.toml", "nf4", merged, path=str(bench / "m")))
    assert ran.code == 1
    assert "loses the change" in ran.err
    assert 'format = "adapter"' in ran.err
    assert not (bench / "m").exists()


def half_a_file(bench):
    (bench / "cat.png").write_bytes((bench / "cat.png").read_bytes()[:300])


def nan_features(bench):
    save_features(bench / "features.safetensors", {"image": features()[0] * float("nan")})


def two_features(bench):
    save_features(bench / "features.safetensors", {"a": features()[0], "b": features()[0]})


def narrow_features(bench):
    save_features(bench / "features.safetensors", {"image": torch.zeros(4, 10)})


def other_encoder(bench):
    save_encoder("clip", bench / "eyes", hidden_size=16)


def other_family(bench):
    save_tiny("qwen3", bench / "base", tokenizer=True)


def more_layers(bench):
    save_tiny("llama", bench / "base", tokenizer=True, num_hidden_layers=3)


def other_heads(bench):
    save_tiny("llama-multi-head", bench / "base", tokenizer=True)


def no_silu(bench):
    save_tiny("llama", bench / "base", tokenizer=True, hidden_act="gelu")


def large_weights(bench):
    file = bench / "g" / "model.safetensors"
    save_file({name: one * 1e20 for name, one in load_file(file).items()}, file)


def a_bomb(bench):
    (bench / "cat.png").write_bytes(png_header(60000, 60000))


def a_text(bench):
    (bench / "cat.png").write_text("a cat")


def high_rank(bench):
    edit_json(bench / "g" / "config.json", rank=65)


def gptq(bench):
    edit_json(bench / "base" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def integer_weights(bench):
    file = bench / "base" / "model.safetensors"
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**load_file(file), name: load_file(file)[name].to(torch.int8)}, file)


def integer_generator(bench):
    file = bench / "g" / "model.safetensors"
    save_file({name: one.to(torch.int8) for name, one in load_file(file).items()}, file)


IMAGE, FEATURES = {"image": "cat.png"}, {"features": "features.safetensors"}
REFUSED = {
    "no image": (None, {"image": "dog.png"}, 3, "there is no such image"),
    "half a file": (half_a_file, IMAGE, 3, "the image cannot be decoded"),
    "a text": (a_text, IMAGE, 3, "is no image"),
    "a bomb": (a_bomb, IMAGE, 3, "too many pixels: decoding it could fill the memory"),
    "a rank too high": (high_rank, FEATURES, 3, "rank: 65 is larger than a dimension: inputs of q is 64"),
    "a base in gptq": (gptq, FEATURES, 3, "quantised with gptq, which regraft does not read"),
    "integers for weights": (integer_weights, FEATURES, 1, "in a dtype that cannot be computed with"),
    "integers in the generator": (integer_generator, FEATURES, 3, "a weight of the generator is no float tensor"),
    "image and features": (None, {**IMAGE, **FEATURES}, 2, "give one of `image`, `images` and `features`"),
    "neither": (None, {}, 2, "found none of them"),
    "no generator": (None, {**IMAGE, "generator": "h"}, 3, "there is no such checkpoint"),
    "a model for a generator": (None, {**IMAGE, "generator": "base"}, 3, "is no generator of perceptual weights"),
    "another family": (other_family, IMAGE, 3, "the generator was made for another model"),
    "more layers": (more_layers, IMAGE, 3, "found: llama, 3 layers"),
    "other heads": (other_heads, IMAGE, 3, "k: 64 to 32 features"),
    "an unknown type": (None, {**IMAGE, "types": "x"}, 2, "expected letters of qkvom"),
    "another activation": (no_silu, IMAGE, 1, "the MLP's activation is gelu, not silu"),
    "another encoder": (other_encoder, IMAGE, 3, "4 features of width 16"),
    "an encoder that is gone": (lambda bench: (bench / "eyes").rename(bench / "ears"), IMAGE, 3,
                                "vision encoder cannot be opened"),
    "another width": (narrow_features, FEATURES, 3, "the features are not those that the generator reads"),
    "features of two": (two_features, FEATURES, 2, "does not hold the features of one image"),
    "an unknown name": (None, {**FEATURES, "names": ["b"]}, 3, "the file has no such features"),
    "NaN": (nan_features, FEATURES, 3, "features are NaN or infinite"),
    "too large": (large_weights, FEATURES, 3, "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_written(fault, bench):
    damage, step, code, words = REFUSED[fault]
    if damage is not None:
        damage(bench)
    file = recipe(bench, **step)
    before = names(bench)
    ran = regraft("apply", file)
    assert ran.code == code, ran.err
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert names(bench) == before


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral"])
def test_type_m_is_refused_where_a_class_has_no_biases(family, tmp_path):
    base = save_tiny(family, tmp_path / "base", tokenizer=True)
    make_generator(base, tmp_path / "g")
    save_features(tmp_path / "features.safetensors")
    file = recipe(tmp_path, **FEATURES)
    before = names(tmp_path)
    ran = regraft("apply", file)
    assert ran.code == 1
    assert "this model cannot express" in ran.err
    assert 'types = "qkvo"' in ran.err
    assert names(tmp_path) == before
    done("plan", recipe(tmp_path, types="qkvo", **FEATURES))
