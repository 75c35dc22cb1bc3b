"""Merging an image: the merged model is the model with deltas beside it, in every layout of weights."""

from dataclasses import replace

import pytest
import torch

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import FileRef
from regraft.core.errors import UsageError
from regraft.core.low_rank import LowRankDelta
from regraft.core.patch import overlay
from regraft.core.sources.folder import open_folder
from regraft.core.specs import torch_dtype
from regraft.core.training.model import materialise_model
from regraft.core.transformation import Run
from regraft.plugins.vlora import Vlora
from regraft.plugins.vlora.params import VloraParams
from regraft.plugins.vlora.settings import ROLES
from regraft.plugins.vlora.widen import gate_of
from tests.checkpoints import bits
from tests.families import save_tiny, tiny
from tests.plugins.vlora.generators import (
    features,
    gpt2_parts,
    hooked_logits,
    llama_parts,
    make_generator,
    save_features,
    vlora,
)

TOKENS = torch.tensor([[1, 5, 9, 77, 33, 120]])
LAYERS = {"num_hidden_layers": 4}
FOUR = {
    "llama": (llama_parts, "qkvom", LAYERS),
    "qwen3": (llama_parts, "qkvo", LAYERS),
    "gemma3_text": (llama_parts, "qkvo", {**LAYERS, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gpt2": (gpt2_parts, "qkvo", {"n_layer": 4}),
}


def relative(one, other):
    return float((one - other).norm() / other.norm())


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return save_tiny("llama", folder / "base", **LAYERS), folder


@pytest.mark.parametrize("family", FOUR)
@pytest.mark.parametrize("weights_sep", [True, False], ids=["separate", "shared"])
def test_merged_is_the_model_with_deltas_beside_it(family, weights_sep, tmp_path):
    parts, types, config = FOUR[family]
    base = save_tiny(family, tmp_path / "base", **config)
    generator = make_generator(base, tmp_path / "g", types=types, weights_sep=weights_sep)
    patch, after = vlora(base, tmp_path / "g", tmp_path)
    with torch.no_grad():
        merged, plain = materialise_model(after)(TOKENS).logits, tiny(family, **config)(TOKENS).logits
    expected = hooked_logits(tiny(family, **config), generator, features(), TOKENS, parts)
    assert relative(merged, expected) < 1e-5
    assert relative(plain, expected) > 0.01
    assert patch.metrics["layers"] == [1, 3]


def test_float64_weights_take_the_delta_to_the_last_digits(tmp_path):
    base = save_tiny("llama", tmp_path / "base", dtype=torch.float64, **LAYERS)
    generator = make_generator(base, tmp_path / "g", types="qkvo")
    patch, after = vlora(base, tmp_path / "g", tmp_path)
    below = open_folder(base, label="base")
    pairs = generator(features())
    for name, edit in patch.edits.items():
        layer, letter = int(name.split(".")[2]), name.split(".")[4][0]
        A, B = (part.double() for part in pairs[letter, layer])
        before, delta = below.load(name), after.load(name) - below.load(name)
        assert relative(delta, 2.0 * B @ A[0].T) < 1e-13
        assert int(torch.linalg.matrix_rank(delta, rtol=1e-9)) == 3
        back = LowRankDelta(name, edit.operation.left, edit.operation.right, -edit.operation.scale)
        undone = back.prepare("cpu")(0, len(before), after.load(name))
        assert float((undone - before).abs().max()) < 1e-15 * float(before.abs().max()) * 4


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "falcon", "gemma3"])
def test_fused_and_interleaved_projections_change_in_their_own_rows(family, tmp_path):
    base = save_tiny(family, tmp_path / "base")
    generator = make_generator(base, tmp_path / "g", types="kvoq")
    patch, after = vlora(base, tmp_path / "g", tmp_path)
    below = open_folder(base, label="base")
    architecture = architecture_of(below.config, below.specs)
    expected = {}
    for (letter, layer), (A, B) in generator(features()).items():
        slot = architecture.slot(ROLES[letter], layer)
        stored = expected.get(slot.tensor, below.load(slot.tensor))
        expected[slot.tensor] = slot.write(stored, slot.read(stored) + generator.scale * B @ A[0].T)
    for name, tensor in expected.items():
        assert torch.allclose(after.load(name), tensor, rtol=0, atol=1e-6), name
    assert set(patch.edits) == set(expected)


def test_a_generator_at_its_start_leaves_every_byte(llama, tmp_path):
    base, _ = llama
    stored = open_folder(base, label="base")
    make_generator(base, tmp_path / "g", types="qkvo", zero=True)
    patch, after = vlora(base, tmp_path / "g", tmp_path)
    assert set(patch.edits) == {f"model.layers.{layer}.self_attn.{t}_proj.weight" for layer in (1, 3) for t in "qkvo"}
    assert all(bits(after.load(name)) == bits(stored.load(name)) for name in stored.specs)


def test_type_m_is_new_hidden_units(llama, tmp_path):
    base, _ = llama
    make_generator(base, tmp_path / "g", types="m")
    _, after = vlora(base, tmp_path / "g", tmp_path, mlp_multiple=1)
    assert after.config["intermediate_size"] == 96 + 3
    assert after.config["mlp_bias"] is True
    gates = [after.load(f"model.layers.{layer}.mlp.gate_proj.bias") for layer in range(4)]
    assert [float(gate[:96].abs().max()) for gate in gates] == [0.0] * 4
    assert [gate[96:].tolist() for gate in gates] == [[0.0] * 3, [64.0] * 3] * 2
    below = open_folder(base, label="base")
    up = after.load("model.layers.0.mlp.up_proj.weight")
    assert bits(up[:96]) == bits(below.load("model.layers.0.mlp.up_proj.weight"))
    assert not up[96:].any()


def test_a_width_without_type_m_is_refused(llama, tmp_path):
    base, _ = llama
    make_generator(base, tmp_path / "g", types="q")
    with pytest.raises(UsageError, match="mlp_multiple has no effect"):
        vlora(base, tmp_path / "g", tmp_path, mlp_multiple=32)


def test_type_m_keeps_biases_that_are_there(tmp_path):
    base = save_tiny("llama-biased", tmp_path / "base")
    generator = make_generator(base, tmp_path / "g", types="mq")
    _, after = vlora(base, tmp_path / "g", tmp_path)
    with torch.no_grad():
        merged = materialise_model(after)(TOKENS).logits
    expected = hooked_logits(tiny("llama-biased"), generator, features(), TOKENS, llama_parts)
    assert relative(merged, expected) < 1e-5


@pytest.mark.parametrize(("code", "dtype"), [("F64", torch.float64), ("F32", torch.float32), ("F16", torch.float16),
                                             ("BF16", torch.bfloat16)])  # fmt: skip
def test_a_new_gate_is_open_in_the_dtype_of_the_weights(code, dtype):
    bias, gain = gate_of(code)
    stored = torch.tensor(bias, dtype=dtype)
    assert float(torch.nn.functional.silu(stored)) == pytest.approx(gain, rel=1e-15 if code == "F64" else 0)
    assert float(torch.nn.functional.silu(stored.double())) == pytest.approx(gain, rel=2e-4)
    if code != "F16":
        assert float(torch.nn.functional.silu(stored.bfloat16())) == gain, "the model may be written or loaded in bf16"


def test_type_m_in_bfloat16(tmp_path):
    """Apart from the weights' rounding, which both have, a wider MLP in bf16 is the delta beside it."""
    base = save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16, **LAYERS)
    generator = make_generator(base, tmp_path / "g", types="m")
    _, after = vlora(base, tmp_path / "g", tmp_path)
    with torch.no_grad():
        for layer in (1, 3):
            A, B = generator(features())["m", layer]
            up, down = (after.load(f"model.layers.{layer}.mlp.{part}_proj.weight").float() for part in ("up", "down"))
            rounded = down[:, 96:] @ (64.0 * up[96:])
            assert relative(rounded, B.bfloat16().float() @ (2.0 * A[0].T).bfloat16().float()) < 1e-6


def test_several_images_are_the_sum_of_their_deltas(llama, tmp_path):
    base, _ = llama
    make_generator(base, tmp_path / "g", types="qo")
    both = features(count=2)
    file = save_features(tmp_path / "two.safetensors", {"a": both[0].clone(), "b": both[1:].clone()})
    patch, after = vlora(base, tmp_path / "g", tmp_path, features=file, names=("a", "b"))
    one, first = vlora(base, tmp_path / "g", tmp_path, features=file, names=("a",))
    second = vlora(base, tmp_path / "g", tmp_path, features=file, names=("b",))[1]
    below = open_folder(base, label="base")
    for name, edit in one.edits.items():
        total = first.load(name) + second.load(name) - below.load(name)
        assert torch.allclose(after.load(name), total, rtol=0, atol=1e-6)
        assert patch.edits[name].operation.left.spec == edit.operation.left.spec
    assert any("summed" in note for note in patch.notes)


def test_some_types_at_half_their_strength(llama, tmp_path):
    base, _ = llama
    make_generator(base, tmp_path / "g")
    patch, _ = vlora(base, tmp_path / "g", tmp_path, types="vq", scale=0.5)
    assert {name.split(".")[4] for name in patch.edits} == {"q_proj", "v_proj"}
    assert {edit.operation.scale for edit in patch.edits.values()} == {1.0}
    assert any("types kom are left out" in note for note in patch.notes)


def test_what_bfloat16_loses_is_told(tmp_path):
    base = save_tiny("llama", tmp_path / "base", dtype=torch.bfloat16)
    make_generator(base, tmp_path / "g", types="qkvo")
    large, _ = vlora(base, tmp_path / "g", tmp_path)
    small, _ = vlora(base, tmp_path / "g", tmp_path, scale=1e-3)
    assert large.metrics["lost"] < 0.1 < small.metrics["lost"]
    assert not any("rounding" in note for note in large.notes)
    assert any("rounding takes more than 10%" in note for note in small.notes)
    assert "deltas.json" in small.reports


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_merges_the_same_delta(llama, tmp_path):
    import peft

    base, _ = llama
    generator = make_generator(base, tmp_path / "g", types="qkvo")
    _, after = vlora(base, tmp_path / "g", tmp_path)
    settings = generator.settings
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.rank * settings.scale, layers_to_transform=list(settings.active_layers),
        target_modules=list(ROLES.values()),
    )  # fmt: skip
    model = peft.get_peft_model(tiny("llama", **LAYERS), config)
    with torch.no_grad():
        for (letter, layer), (A, B) in generator(features()).items():
            module = getattr(model.base_model.model.model.layers[layer].self_attn, ROLES[letter])
            module.lora_A["default"].weight.copy_(A[0].T)
            module.lora_B["default"].weight.copy_(B)
    theirs = model.merge_and_unload().state_dict()
    assert all(torch.allclose(after.load(name), theirs[name], rtol=0, atol=1e-6) for name in after.specs)


def test_a_second_image_goes_on_top_of_the_first(llama, tmp_path):
    base, _ = llama
    make_generator(base, tmp_path / "g", types="qm")
    patch, first = vlora(base, tmp_path / "g", tmp_path)
    again = overlay(first, _again(first, tmp_path), by="again")
    assert again.config["intermediate_size"] == 96 + 2 * 64
    materialise_model(again)
    assert patch.json["config.json"]["intermediate_size"] == 96 + 64


def test_minus_one_takes_an_image_off_again(llama, tmp_path):
    base, _ = llama
    make_generator(base, tmp_path / "g", types="qkvo")
    patch, merged = vlora(base, tmp_path / "g", tmp_path)
    params = VloraParams(generator=tmp_path / "g", features=tmp_path / "features.safetensors", scale=-1.0)
    back = overlay(merged, Vlora().apply(merged, params, Run("off")), by="off")
    for name in patch.edits:
        before = open_folder(base, label="base").load(name)
        apart = (back.load(name) - before).abs().max()
        assert apart <= torch.finfo(torch.float32).eps * merged.load(name).abs().max()


def test_the_generator_of_an_earlier_step_is_used_and_left_behind(llama, tmp_path):
    base, _ = llama
    make_generator(base, tmp_path / "g", types="qo")
    _, expected = vlora(base, tmp_path / "g", tmp_path)
    below = open_folder(base, label="base")
    own = {f"vlora/{name}": FileRef(tmp_path / "g" / name) for name in ("config.json", "model.safetensors")}
    carrying = replace(below, files={**below.files, **own})
    params = VloraParams(features=tmp_path / "features.safetensors")
    patch = Vlora().apply(carrying, params, Run("vlora"))
    assert not Vlora().plan(carrying, params).deviations(patch)
    after = overlay(carrying, patch, by="vlora")
    assert all(bits(after.load(name)) == bits(expected.load(name)) for name in patch.edits)
    assert not own.keys() & after.files.keys()
    with pytest.raises(UsageError, match="there is no generator"):
        Vlora().plan(below, params)


def _again(checkpoint, tmp_path):
    params = VloraParams(generator=tmp_path / "g", features=tmp_path / "features.safetensors")
    return Vlora().apply(checkpoint, params, Run("again"))


def test_every_tensor_of_a_merge_is_in_the_dtype_that_it_states(llama, tmp_path):
    base, _ = llama
    make_generator(base, tmp_path / "g", types="m")
    patch, _ = vlora(base, tmp_path / "g", tmp_path)
    for edit in patch.edits.values():
        for operand in edit.operation.operands.values():
            assert operand.load().dtype == torch_dtype(operand.spec.dtype), operand.spec
