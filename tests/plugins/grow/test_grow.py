"""Grown models compute what they computed, in every family, and what is new learns."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from regraft.core.architectures import architecture_of
from regraft.core.patch import Outline, overlay
from regraft.core.patch_folder import load_patch, save_patch
from regraft.core.sources.folder import open_folder
from regraft.core.sources.open import open_checkpoint
from regraft.plugins.grow import Grow
from regraft.plugins.grow.params import GrowParams
from tests.checkpoints import bits, read_all, same_bits
from tests.families import FAMILIES, save_tiny
from tests.materialise import materialise
from tests.running import done, write_recipe

IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(5))
LAYER_NORM = ("gpt2", "gpt_neox", "falcon", "cohere2")
FIXED_HEADS = ("gpt2", "gpt_neox", "falcon")
VARIANTS = ("gemma3", "llama-biased", "llama-tied", "llama-multi-head", "qwen3-biased", "qwen3_moe-all-sparse",
            "gemma2-untied", "falcon-sequential", "gpt_neox-tied", "granite-biased", "mixtral-tied")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Called with a family, the folder of its tiny float64 model and the logits; made once."""
    made = {}

    def one(family):
        if family not in made:
            folder = save_tiny(family, tmp_path_factory.mktemp("grow") / family, dtype=torch.float64)
            made[family] = folder, logits(load(folder))
        return made[family]

    return one


def load(folder):
    """The stock model in float64, with nothing missing and nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def grown(folder, target, **sizes):
    checkpoint = open_folder(folder, label="base")
    params, step = GrowParams(**sizes), Grow()
    patch = step.patch(checkpoint, params)
    assert step.plan(checkpoint, params).deviations(patch) == []
    result = overlay(checkpoint, patch, by="grow")
    expected = architecture_of(result.config, result.specs, derive=False).expected_specs()
    assert {name: result.specs[name].shape for name in expected} == expected
    assert patch.metrics["parameters"] == sum(spec.numel for spec in result.specs.values())
    return materialise(result, target)


def farther(one, other):
    return (one - other).abs().max().item()


def heads(family):
    """Twice the heads, where they can grow."""
    multi = family in ("llama-multi-head",)
    return {} if family.split("-")[0] in FIXED_HEADS else {"kv_heads": 8 if multi else 4}


def width(family, new):
    return {"moe_intermediate_size" if family == "qwen3_moe-all-sparse" else "intermediate_size": new}


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_layers_neurons_and_heads_change_no_bit(family, base, tmp_path):
    """Zero columns add zeros; the classes' norms round in fp32, so shared neurons leave no trace behind them either.

    LayerNorm in float64 shows the last bit of the sum of two halves. Twice olmo2's heads have their mean square summed
    in another order, in fp32.
    """
    folder, before = base(family)
    for placement, more in (("stack", heads(family)), ("interpolate", {})):
        sizes = {"layers": 5, "placement": placement, **width(family, 250), "new_neurons": "zero", **more}
        found = farther(logits(load(grown(folder, tmp_path / placement, **sizes))), before)
        assert found <= (1e-6 if more and family == "olmo2" else 0.0), placement
    split = grown(folder, tmp_path / "split", **width(family, 70 if "all-sparse" in family else 150), seed=1)
    assert farther(logits(load(split)), before) <= (1e-13 if family.split("-")[0] in LAYER_NORM else 0.0)


@pytest.fixture
def exact_norms(monkeypatch):
    """Called with a model, makes its norms compute in float64 throughout."""

    def exact(model):
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                eps = getattr(module, "variance_epsilon", None) or module.eps
                offset = 1.0 if type(module).__name__.startswith("Gemma") else 0.0

                def forward(x, module=module, eps=eps, offset=offset):
                    return (offset + module.weight) * x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()

                monkeypatch.setattr(module, "forward", forward)
        return model

    return exact


@pytest.mark.parametrize(
    "family",
    [name for name in (*FAMILIES, *VARIANTS) if name.split("-")[0] not in (*LAYER_NORM, "gemma3")],
)
def test_a_wider_residual_stream_is_the_same_function(family, base, exact_norms, tmp_path):
    """To the last bits if norms are computed in float64, which stock classes do in fp32; gemma's factor of the
    embeddings stands in fp32 even then.
    """
    folder, before = base(family)
    wide = grown(folder, tmp_path / "wide", hidden_size=96, layers=3)
    gemma = family.startswith("gemma")
    assert farther(logits(load(wide)), before) <= 1e-5
    exact = logits(exact_norms(load(folder)))
    assert farther(logits(exact_norms(load(wide))), exact) <= (1e-6 if gemma else 1e-12)
    four = load(grown(folder, tmp_path / "four", hidden_size=256))
    assert farther(logits(four), before) <= (1e-5 if gemma else 0.0), "every factor is a power of two"


def test_a_large_eps_and_small_activations_would_show_a_forgotten_factor(exact_norms, tmp_path):
    folder = save_tiny("qwen3", tmp_path / "base", dtype=torch.float64, rms_norm_eps=0.5)
    wide = grown(folder, tmp_path / "wide", hidden_size=80, heads=8)
    assert json.loads((wide / "config.json").read_text())["rms_norm_eps"] == 0.5 * 64 / 80
    assert farther(logits(exact_norms(load(wide))), logits(exact_norms(load(folder)))) <= 1e-12


SPREAD = {
    "gemma2": {"drop": ["layer_types"]},
    "gemma3_text": {"drop": ["layer_types"], "sliding_window_pattern": 2},
    "cohere2": {"drop": ["layer_types"], "sliding_window_pattern": 2},
    "smollm3": {"drop": ["layer_types", "no_rope_layers"], "no_rope_layer_interval": 2},
    "qwen3": {"drop": ["layer_types"], "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "qwen3_moe": {"drop": [], "mlp_only_layers": [0]},
}


@pytest.mark.parametrize("family", SPREAD)
def test_layers_stay_what_their_number_made_them(family, tmp_path):
    """Where the class works out the kind of a layer from its number, the grown config says it."""
    settings = dict(SPREAD[family])
    dropped = settings.pop("drop")
    shape = {"layer_types": ["sliding_attention", "full_attention"]} if family != "qwen3_moe" else settings
    folder = save_tiny(family, tmp_path / "base", dtype=torch.float64, **(shape if not dropped else {}))
    config = {**json.loads((folder / "config.json").read_text()), **settings}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in dropped}))
    if family == "smollm3":
        assert load(folder).config.no_rope_layers == [1, 0]
    before = logits(load(folder))
    model = load(grown(folder, tmp_path / "grown", layers=3, placement="interpolate"))
    assert farther(logits(model), before) == 0.0
    if dropped:
        kinds = load(folder).config.layer_types
        assert model.config.layer_types == [kinds[0], kinds[0], kinds[1]]


def test_experts_that_one_tensor_stacks_grow_too(base, tmp_path):
    folder, before = base("mixtral")
    checkpoint = open_folder(folder, label="base")
    tensors = {name: tensor.load() for name, tensor in checkpoint.tensors.items() if "experts" not in name}
    for layer in (0, 1):
        old, new = f"model.layers.{layer}.block_sparse_moe.experts", f"model.layers.{layer}.mlp.experts"
        w1, w2, w3 = (
            torch.stack([checkpoint.load(f"{old}.{expert}.w{number}.weight") for expert in range(4)])
            for number in (1, 2, 3)
        )
        tensors |= {f"{new}.gate_up_proj": torch.cat([w1, w3], 1), f"{new}.down_proj": w2}
    stacked = tmp_path / "stacked"
    materialise(checkpoint, stacked)
    save_file(tensors, stacked / "model.safetensors", {"format": "pt"})
    assert farther(logits(load(stacked)), before) == 0.0
    result = load(grown(stacked, tmp_path / "grown", intermediate_size=160, layers=3, hidden_size=256))
    assert farther(logits(result), before) == 0.0


def test_old_layers_move_as_they_are(base, tmp_path):
    """By name alone: no byte of them is computed."""
    folder, _ = base("llama")
    checkpoint = open_folder(folder, label="base")
    patch = Grow().patch(checkpoint, GrowParams(layers=4, placement="interpolate"))
    assert patch.removals == frozenset()
    assert {old.split(".")[2]: new.split(".")[2] for new, old in patch.renames.items()} == {"1": "2"}
    assert {name.split(".")[2] for name in patch.edits} == {"1", "3"}
    above = overlay(checkpoint, patch, by="grow")
    for name, tensor in checkpoint.tensors.items():
        moved = name.replace("layers.1", "layers.2")
        assert above.tensors[moved].raw == tensor.raw
    copied = above.load("model.layers.3.self_attn.q_proj.weight")
    assert bits(copied) == bits(checkpoint.load("model.layers.1.self_attn.q_proj.weight"))
    for silent in ("self_attn.o_proj", "mlp.down_proj"):
        assert not above.load(f"model.layers.3.{silent}.weight").any()


def test_what_is_new_learns(base, tmp_path):
    """One backward pass reaches every new output of a new part; neurons that were split go different ways."""
    folder, _ = base("llama")

    def gradients(**sizes):
        model = load(grown(folder, tmp_path / "-".join(map(str, sizes.values())), **sizes))
        model(IDS, labels=IDS).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    layers = gradients(layers=4)
    for role in ("self_attn.o_proj", "mlp.down_proj"):
        assert all(layers[f"model.layers.{layer}.{role}.weight"].abs().max() > 0 for layer in (2, 3))
    assert gradients(kv_heads=4)["model.layers.0.self_attn.o_proj.weight"][:, 64:].abs().max(0).values.min() > 0
    zero = gradients(intermediate_size=192, new_neurons="zero")["model.layers.0.mlp.down_proj.weight"]
    assert zero[:, 96:].abs().max(0).values.min() > 0
    assert gradients(hidden_size=128)["model.layers.0.mlp.down_proj.weight"][64:].abs().max(1).values.min() > 0
    for noise, alike in ((0.0, True), (0.1, False)):
        gate = gradients(intermediate_size=192, noise=noise)["model.layers.1.mlp.gate_proj.weight"]
        assert torch.allclose(gate[:96], gate[96:], rtol=1e-6) == alike


def test_split_columns_sum_to_the_old_ones_in_bfloat16(tmp_path):
    folder = save_tiny("phi3", tmp_path / "base", dtype=torch.bfloat16)
    old = open_folder(folder, label="base")
    new = open_folder(grown(folder, tmp_path / "new", intermediate_size=160), label="new")
    name = "model.layers.0.mlp.down_proj.weight"
    down, before = new.load(name).double(), old.load(name).double()
    assert torch.equal(down[:, :64] + down[:, 96:], before[:, :64])
    assert torch.equal(down[:, 64:96], before[:, 64:])
    gate_up = new.load("model.layers.0.mlp.gate_up_proj.weight")
    assert torch.equal(gate_up[160:256], old.load("model.layers.0.mlp.gate_up_proj.weight")[96:])


def test_a_saved_patch_holds_formulas_and_gives_the_same_bits(base, tmp_path):
    folder, _ = base("qwen3")
    checkpoint = open_folder(folder, label="base")
    sizes = GrowParams(layers=3, placement="interpolate", intermediate_size=150, kv_heads=3, hidden_size=96)
    patch = Grow().patch(checkpoint, sizes)
    above = overlay(checkpoint, patch, by="grow")
    save_patch(patch, checkpoint, above, tmp_path / "grow.regraft")
    assert (tmp_path / "grow.regraft/tensors.safetensors").stat().st_size < 100
    again, _ = load_patch(tmp_path / "grow.regraft")
    assert Outline.of(again) == Outline.of(patch)
    restored = overlay(checkpoint, again, by="grow")
    assert all(bits(restored.load(name)) == bits(above.load(name)) for name in above.tensors)


def test_a_quantised_base_grows_and_stays_quantised(tiny_folder, tmp_path):
    """As planned; a new layer has the codes of the one that it copies, and zeros where it is silent."""
    nf4, out = tmp_path / "nf4", tmp_path / "out"
    done("apply", write_recipe(tmp_path / "nf4.toml", tiny_folder(), path=str(nf4), quantize="nf4"))
    done("apply", write_recipe(tmp_path / "grow.toml", nf4, {"use": "grow", "layers": 3}, path=str(out)))
    tensors, old = read_all(out), open_folder(nf4, label="nf4")
    new = open_checkpoint(out)
    assert tensors["model.layers.2.mlp.up_proj.weight"].dtype == torch.uint8
    for name, tensor in open_checkpoint(nf4).tensors.items():
        copy = name.replace("layers.0", "layers.2")
        if "o_proj" in name or "down_proj" in name:
            assert copy == name or not new.load(copy).any()
        else:
            assert bits(new.load(copy)) == bits(tensor.load())
    assert same_bits({name: tensors[name] for name in old.tensors}, read_all(nf4))
