"""What cannot grow is refused by name, with the reason and what to do."""

import json

import pytest
from pydantic import ValidationError

from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.sources.folder import open_folder
from regraft.plugins.grow import Grow
from regraft.plugins.grow.params import GrowParams
from tests.checkpoints import write_checkpoint
from tests.families import save_tiny


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "give at least one new size: layers, intermediate_size"),
        ({"hidden_size": 96, "placement": "stack"}, "placement has no effect without layers: remove it"),
        ({"layers": 4, "noise": 0.1}, "noise has no effect without intermediate_size or moe_intermediate_size"),
        ({"intermediate_size": 128, "new_neurons": "zero", "seed": 1}, 'seed is for new_neurons = "split"'),
        ({"layers": 0}, "greater than or equal to 1"),
        ({"intermediate_size": 128, "noise": 0.6}, "less than or equal to 0.5"),
        ({"depth": 4}, "Extra inputs are not permitted"),
    ],
)
def test_keys_that_make_no_sense(keys, message):
    with pytest.raises(ValidationError, match=message):
        GrowParams(**keys)


def refused(kind, folder, **sizes):
    with pytest.raises(kind) as caught:
        Grow().plan(open_folder(folder, label="base"), GrowParams(**sizes))
    error = caught.value
    assert error.remedy
    return error.message, error.where, error.expected, error.found


def test_sizes_that_are_no_growth_or_do_not_fit(tiny_folder):
    llama = tiny_folder("llama")
    for name, old in (("layers", 2), ("intermediate_size", 96), ("hidden_size", 64), ("heads", 4)):
        assert refused(UsageError, llama, **{name: old}) == ("is no growth", name, f"more than the {old} there are",
                                                             str(old))  # fmt: skip
    assert refused(UsageError, llama, intermediate_size=193) == (
        "split neurons at most double an MLP", "intermediate_size", "at most 192", "193")  # fmt: skip
    assert refused(UsageError, llama, heads=7) == (
        "2 query heads share a key-value head, and only whole groups are added", "heads, kv_heads",
        "heads = 2 times kv_heads", "7 heads, 3 key-value heads")  # fmt: skip
    assert refused(UsageError, llama, heads=8, kv_heads=2)[3] == "8 heads, 2 key-value heads"
    assert refused(UsageError, llama, heads=6) == (
        "the class of llama wants a hidden size that is a multiple of the heads", "hidden_size, heads",
        "a multiple of 6", "64")  # fmt: skip


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "cohere2"])
def test_the_width_of_a_layer_norm(family, tiny_folder):
    message, where, _, _ = refused(Unsupported, tiny_folder(family), hidden_size=128)
    assert message.startswith(f"the hidden size of {family} cannot grow exactly: its LayerNorm subtracts the mean")
    assert where == "hidden_size"


def test_heads_and_widths_of_other_families(tiny_folder):
    for family in ("gpt2", "gpt_neox", "falcon"):
        message, where, _, _ = refused(Unsupported, tiny_folder(family), heads=8)
        assert (message.split(":")[0], where) == (f"the number of heads of {family} cannot grow exactly", "heads")
    assert "vision projector" in refused(Unsupported, tiny_folder("gemma3"), hidden_size=96)[0]
    message, _, expected, found = refused(Unsupported, tiny_folder("olmo2"), heads=6)
    assert message.startswith("olmo2 norms the queries of all heads together")
    assert (expected, found) == ("a multiple of 4", "6")
    message, where, *_ = refused(Unsupported, tiny_folder("qwen3_moe-all-sparse"), intermediate_size=128)
    assert (message, where) == ("no layer of this model has that size: qwen3_moe", "intermediate_size")
    assert refused(Unsupported, tiny_folder("llama"), moe_intermediate_size=64)[1] == "moe_intermediate_size"
    message, _, expected, found = refused(Unsupported, tiny_folder("starcoder2"), layers=4)
    assert "this family is not in the table" in message
    assert found == "starcoder2"
    assert "llama" in expected


def changed(folder, target, change, extra=()):
    """The tiny llama with another config.json, and with tensors that are not its own."""
    checkpoint = open_folder(folder, label="base")
    tensors = {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
    tensors |= {name: next(iter(tensors.values())).clone() for name in extra}
    config = {key: value for key, value in {**checkpoint.config, **change}.items() if value is not None}
    return write_checkpoint(target, tensors, config=config)


def test_checkpoints_that_are_not_what_they_say(tiny_folder, tmp_path):
    llama = tiny_folder("llama")
    code = changed(llama, tmp_path / "code", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}})
    assert "brings Python code of its own" in refused(Unsupported, code, layers=4)[0]
    stray = changed(llama, tmp_path / "stray", {}, ["model.layers.0.mlp.extra.weight"])
    message, where, *_ = refused(Unsupported, stray, layers=4)
    assert message.startswith("a tensor is no part of the family that is known")
    assert where == "base: model.layers.0.mlp.extra.weight"
    eps = changed(llama, tmp_path / "eps", {"rms_norm_eps": None})
    assert refused(InputError, eps, hidden_size=96)[1:] == ("config.json: rms_norm_eps", "a number", "None")
    size = changed(llama, tmp_path / "size", {"intermediate_size": 90})
    message, _, expected, _ = refused(InputError, size, intermediate_size=128)
    assert (message, expected) == ("config.json says another size", "90 along axis 1")
    types = changed(tiny_folder("gemma2"), tmp_path / "types", {"layer_types": ["full_attention"]})
    assert refused(InputError, types, layers=3) == (
        "does not say what each layer is", "config.json: layer_types", "2 entries", "1 entries")  # fmt: skip
    more = changed(llama, tmp_path / "more", {"num_hidden_layers": 3})
    assert refused(InputError, more, layers=4)[0] == "a tensor of the model is missing"


def test_attention_divided_by_the_number_of_its_layer(tmp_path):
    folder = save_tiny("gpt2", tmp_path / "gpt2", scale_attn_by_inverse_layer_idx=True)
    assert "which interpolation changes" in refused(Unsupported, folder, layers=3, placement="interpolate")[0]
    config = Grow().plan(open_folder(folder, label="base"), GrowParams(layers=3)).json["config.json"]
    assert config == {"n_layer": 3}


def test_a_plan_imports_no_torch(tiny_folder):
    import subprocess
    import sys

    code = (
        "import sys\nfrom pathlib import Path\nfrom regraft.core.sources.folder import open_folder\n"
        "from regraft.plugins.grow import Grow\nfrom regraft.plugins.grow.params import GrowParams\n"
        "sizes = GrowParams(layers=3, intermediate_size=128, hidden_size=96)\n"
        "Grow().plan(open_folder(Path(sys.argv[1]), label='base'), sizes)\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tiny_folder("llama"))], check=False).returncode == 0


def test_the_config_is_read_as_json(tiny_folder):
    """Numbers of config.json stay numbers that JSON can hold."""
    change = Grow().plan(open_folder(tiny_folder("gemma3"), label="base"), GrowParams(layers=3, heads=8)).json
    text = json.loads(json.dumps(change))["config.json"]["text_config"]
    assert text == {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}  # fmt: skip
