"""The generator: its formula, its counts, its folder, and the published layout."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.errors import InputError, RegraftError
from regraft.plugins.vlora.folder import open_generator, save_generator
from regraft.plugins.vlora.generator import empty_generator, new_generator
from regraft.plugins.vlora.published import PREFIX, published_name
from regraft.plugins.vlora.settings import GeneratorSettings
from tests.plugins.vlora.generators import edit_json, features, trained

WIDTHS = {"inputs": {"q": 20, "k": 20, "o": 24, "m": 20}, "outputs": {"q": 24, "k": 12, "o": 20, "m": 20}}
SIZES = {"dim": 8, "depth": 2, "heads": 2, "visual_dim": 12, "pos_num": 4, "rank": 3, "alpha": 6.0,
         "types": "qkom", "skip_layers": 2, "num_layers": 5}  # fmt: skip
SQUARE = {**{key: dict.fromkeys("qkom", 20) for key in WIDTHS}, "dim": 16, "heads": 16}
"""One width for all, as the authors' code has it, and its number of heads."""


def sizes(**changes):
    return GeneratorSettings(**{**SIZES, **WIDTHS, **changes})


def published(**changes):
    every = dict.fromkeys("qkvom", 4096)
    return GeneratorSettings(num_layers=32, inputs=every, outputs=every, **changes)


@pytest.mark.parametrize(("dim", "millions"), [(512, 851.9), (1024, 2027.5)])
def test_counts_of_the_published_sizes(dim, millions):
    settings = published(dim=dim)
    assert round(settings.num_parameters / 1e6, 1) == millions
    assert settings.num_parameters == sum(parameter.numel() for parameter in empty_generator(settings).parameters())
    assert settings.active_layers == (3, 7, 11, 15, 19, 23, 27, 31)
    assert settings.scale == 1.0


@pytest.mark.parametrize("weights_sep", [True, False])
def test_shapes_are_those_of_the_module(weights_sep):
    settings = sizes(weights_sep=weights_sep)
    module = empty_generator(settings).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in module.items()} == settings.shapes()


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def attention(state, name, query, seen, heads):
    """Softmax attention written out, head by head."""
    weights = state[f"{name}.in_proj_weight"].chunk(3)
    biases = state[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query, seen, seen), weights, biases, strict=True))
    parts = []
    for part in range(heads):
        where = slice(part * q.shape[-1] // heads, (part + 1) * q.shape[-1] // heads)
        scores = q[:, where] @ k[:, where].T / math.sqrt(q.shape[-1] // heads)
        parts.append(scores.softmax(-1) @ v[:, where])
    return torch.cat(parts, -1) @ state[f"{name}.out_proj.weight"].T + state[f"{name}.out_proj.bias"]


def written_out(state, settings, x):
    """The factors of one image by the paper's formulas, float64."""
    seen = x @ state["visual_proj.weight"].T + state["visual_proj.bias"] + state["pos_embed"][0]
    found = {}
    for group, types in settings.groups.items():
        own = {
            name.removeprefix(f"gen.{group}."): one for name, one in state.items() if name.startswith(f"gen.{group}.")
        }
        query = own["queries"][0]
        for n in range(settings.depth):
            at = f"decoders.{n}"
            normed = layer_norm(query, own[f"{at}.norm1.weight"], own[f"{at}.norm1.bias"])
            query = query + attention(own, f"{at}.self_attn", normed, normed, settings.heads)
            normed = layer_norm(query, own[f"{at}.norm2.weight"], own[f"{at}.norm2.bias"])
            query = query + attention(own, f"{at}.cross_attn", normed, seen, settings.heads)
            normed = layer_norm(query, own[f"{at}.norm3.weight"], own[f"{at}.norm3.bias"])
            hidden = normed @ own[f"{at}.linear1.weight"].T + own[f"{at}.linear1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            query = query + hidden @ own[f"{at}.linear2.weight"].T + own[f"{at}.linear2.bias"]
        query = layer_norm(query, own["norm.weight"], own["norm.bias"])
        for slot, letter in enumerate(types):
            width = settings.inputs[letter]
            for index, layer in enumerate(settings.active_layers):
                row = query[slot * len(settings.active_layers) + index]
                flat = own[f"weights_head.{width}.weight"] @ row + own[f"weights_head.{width}.bias"]
                found[letter, layer] = flat.reshape(width, settings.rank), state[f"B.{letter}"][index]
    return found


@pytest.mark.parametrize("weights_sep", [True, False])
def test_factors_follow_the_formula(weights_sep):
    settings = sizes(weights_sep=weights_sep)
    generator = trained(settings).double()
    x = features(count=2).double()
    found = generator(x)
    assert [key for key in found if key[0] == "q"] == [("q", 1), ("q", 3)]
    for number in range(2):
        expected = written_out(generator.state_dict(), settings, x[number])
        assert set(found) == set(expected)
        for key, (A, B) in expected.items():
            assert torch.allclose(found[key][0][number], A, rtol=0, atol=1e-12)
            assert torch.equal(found[key][1], B)


def test_a_row_without_an_image_has_no_delta():
    generator = trained(sizes())
    x = features(count=2)
    both, one = generator(x, torch.tensor([True, False])), generator(x[:1])
    for key, (A, _) in both.items():
        assert not A[1].any()
        assert torch.allclose(A[:1], one[key][0], rtol=0, atol=1e-6)


def test_at_the_start_every_delta_is_zero_and_the_seed_decides():
    before = torch.get_rng_state()
    one, same, other = (new_generator(sizes(), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(not B.any() for _, B in one(features()).values())
    assert all(A.abs().max() > 0 for A, _ in one(features()).values())
    pairs = zip(one.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(mine, yours) for mine, yours in pairs)
    assert not torch.equal(one.pos_embed, other.pos_embed)
    assert float(one.gen["q"].queries.detach().std()) == pytest.approx(1, rel=0.5)
    assert float(one.visual_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_gives_back_what_was_saved(dtype, tmp_path):
    generator = trained(sizes())
    save_generator(generator, tmp_path / "g", dtype=dtype)
    opened = open_generator(tmp_path / "g")
    assert opened.settings == generator.settings
    assert opened.nbytes == generator.settings.num_parameters * (4 if dtype == "float32" else 2)
    loaded = opened.load().state_dict()
    for name, tensor in generator.state_dict().items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype)).float())


def publish(generator, folder, **changes):
    """Write the generator as the authors' code does, beside a tensor of the language model."""
    settings = generator.settings
    state = {f"{PREFIX}{published_name(name, settings.types)}": tensor.clone()
             for name, tensor in generator.state_dict().items() if not name.startswith("B.")}  # fmt: skip
    flat = [generator.B[letter].flatten(1) for letter in settings.types]
    state[f"{PREFIX}Bs"] = torch.cat(flat)[None]
    state["model.embed_tokens.weight"] = torch.zeros(4, 20)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = {
        "model_type": "llava_vlora", "vlora_dim": 16, "vlora_depth": 2, "vlora_visual_dim": 12, "vlora_pos_num": 4,
        "vlora_llm_dim": 20, "vlora_llm_depth": 5, "vlora_rank": 3, "vlora_type": settings.types, "vlora_alpha": 6,
        "weights_sep": settings.weights_sep, "skip_layers": 2, "mm_vision_tower": "openai/clip", **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({key: one for key, one in config.items() if one is not None}))
    return set(state)


@pytest.mark.parametrize("types", ["qkom", "mkoq"])
@pytest.mark.parametrize("weights_sep", [True, False])
def test_the_published_layout_is_read(weights_sep, types, tmp_path):
    generator = trained(sizes(weights_sep=weights_sep, types=types, **SQUARE))
    names = publish(generator, tmp_path / "p")
    assert f"{PREFIX}gen.{'0.' if weights_sep else ''}decoders.1.multihead_attn.in_proj_weight" in names
    opened = open_generator(tmp_path / "p")
    assert (opened.settings.vision_tower, opened.settings.select_layer) == ("openai/clip", -2)
    expected, found = generator(features()), opened.load()(features())
    assert expected.keys() == found.keys()
    for key, (A, B) in expected.items():
        assert torch.equal(found[key][0], A)
        assert torch.equal(found[key][1], B)


def test_the_published_layout_needs_its_sizes(tmp_path):
    generator = trained(sizes(**SQUARE))
    publish(generator, tmp_path / "a", vlora_rank=None)
    with pytest.raises(InputError, match="lacks keys") as caught:
        open_generator(tmp_path / "a")
    assert caught.value.expected == "vlora_rank"
    publish(generator, tmp_path / "b", vlora_rank=2)
    with pytest.raises(InputError, match="another shape than the config says"):
        open_generator(tmp_path / "b")


def drop(folder):
    state = load_file(folder / "model.safetensors")
    del state["pos_embed"]
    save_file(state, folder / "model.safetensors")


def integers(folder):
    state = load_file(folder / "model.safetensors")
    save_file({**state, "pos_embed": state["pos_embed"].to(torch.int8)}, folder / "model.safetensors")


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


BROKEN = {
    "no tensor": (drop, "contradict each other", "pos_embed"),
    "integers": (integers, "no float tensor", "I8"),
    "a pickle": (only_pickle, "pickle", ""),
    "another file": (lambda folder: edit_json(folder / "config.json", format="x"), "no generator", "vlora-train"),
    "another rank": (lambda folder: edit_json(folder / "config.json", rank=2), "contradict each other", "[40, 8]"),
    "a rank too large": (lambda folder: edit_json(folder / "config.json", rank=13), "no valid configuration",
                         "rank: 13 is larger than a dimension: outputs of k is 12"),
    "heads that do not divide": (lambda folder: edit_json(folder / "config.json", heads=3), "no valid configuration",
                                 "8 is no multiple of heads, 3"),
    "unknown types": (lambda folder: edit_json(folder / "config.json", types="qx"), "no valid configuration", "qkvom"),
    "an unknown key": (lambda folder: edit_json(folder / "config.json", code="x"), "no valid configuration", "code"),
    "a damaged header": (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "", ""),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused(fault, tmp_path):
    save_generator(trained(sizes()), tmp_path / "g")
    damage, message, detail = BROKEN[fault]
    damage(tmp_path / "g")
    with pytest.raises(RegraftError) as caught:
        open_generator(tmp_path / "g")
    assert caught.value.exit_code == 3
    assert message in caught.value.message
    assert detail in str(caught.value)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    generator = trained(sizes())
    generator.pos_embed[0, 1, 2] = math.nan
    save_generator(generator, tmp_path / "g")
    with pytest.raises(InputError, match="NaN or infinite"):
        open_generator(tmp_path / "g").load()
