"""Every row of the table against the stock class: names, shapes, defaults."""

import subprocess
import sys

import pytest

from regraft.core.architectures import architecture_of
from regraft.core.architectures.families import built_in
from tests.core.architectures.saved import write
from tests.families import CONFIGS, FAMILIES, OUTSIDE_TABLE, VARIANTS, tiny

NAMES = (*FAMILIES, "gemma3", *VARIANTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_config_implies_exactly_the_tensors_that_transformers_writes(saved, name):
    checkpoint = saved(name)
    expected = architecture_of(checkpoint.config, checkpoint.tensors).expected_specs()
    assert expected == {key: shape for key, shape in checkpoint.shapes.items() if not _is_vision(key)}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_same_without_the_tensors(saved, name):
    checkpoint = saved(name)
    assert architecture_of(checkpoint.config).expected_specs() == checkpoint.architecture.expected_specs()


def _is_vision(name):
    return name.startswith(("vision_tower.", "multi_modal_projector."))


def test_the_vision_tower_stands_beside_the_text_model(saved):
    checkpoint = saved("gemma3")
    beside = {name for name in checkpoint.tensors if checkpoint.architecture.ignores(name)}
    assert beside == {name for name in checkpoint.tensors if _is_vision(name)}
    assert len(beside) > 20


def test_the_table_holds_the_families_of_the_tests():
    assert set(built_in()) == {*FAMILIES, "gemma3"} == set(CONFIGS) - set(OUTSIDE_TABLE)


@pytest.mark.parametrize("model_type", [*FAMILIES, "gemma3"])
def test_an_empty_config_means_what_it_means_to_the_stock_class(model_type):
    from transformers import AutoConfig

    stock = AutoConfig.for_model(model_type)
    text = stock.get_text_config()
    ours = architecture_of({"model_type": model_type})
    heads = text.num_attention_heads
    assert ours.tie_word_embeddings == stock.tie_word_embeddings
    assert (ours.vocab_size, ours.hidden_size) == (text.vocab_size, text.hidden_size)
    assert (ours.num_layers, ours.num_heads) == (text.num_hidden_layers, heads)
    if model_type != "falcon":  # whose num_kv_heads counts in the new decoder only
        assert ours.num_kv_heads == getattr(text, "num_key_value_heads", heads)
    assert ours.head_dim == (getattr(text, "head_dim", None) or text.hidden_size // heads)
    for switch in ("attention_bias", "mlp_bias", "bias", "moe_intermediate_size", "num_local_experts"):
        assert ours.settings.get(switch) == getattr(text, switch, None)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_with_nulls_and_without_defaults_means_the_same(saved, model_type):
    checkpoint = saved(model_type)
    sparse = {key: value for key, value in checkpoint.config.items() if key in CONFIGS[model_type]}
    expected = checkpoint.architecture.expected_specs()
    assert architecture_of({"model_type": model_type, **sparse}).expected_specs() == expected


def test_null_key_value_heads_mean_as_many_as_heads():
    for model_type in ("llama", "mistral", "qwen3", "olmo2"):
        assert architecture_of({"model_type": model_type, "num_key_value_heads": None}).num_kv_heads == 32


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox"])
def test_keys_that_the_stock_class_does_not_read_change_nothing(saved, model_type):
    config = saved(model_type).config
    odd = {**config, "num_key_value_heads": 2, "head_dim": 32}
    assert architecture_of(odd).expected_specs() == architecture_of(config).expected_specs()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_both_names_of_the_number_of_experts_are_read(saved, model_type):
    config = dict(saved(model_type).config)
    config["num_experts"] = config.pop("num_local_experts")
    assert architecture_of(config).num_experts == 4
    assert architecture_of(config).expected_specs() == saved(model_type).architecture.expected_specs()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "falcon", "mixtral", "qwen3_moe"])
def test_a_base_model_checkpoint_has_no_prefix_and_no_head(tmp_path, model_type):
    checkpoint = write(tiny(model_type).base_model, tmp_path)
    assert not any(name.startswith(("model.", "transformer.", "gpt_neox.")) for name in checkpoint.tensors)
    architecture = checkpoint.architecture
    assert architecture.expected_specs() == checkpoint.shapes
    assert architecture.headless != architecture.tie_word_embeddings
    assert architecture.has("lm_head") == architecture.tie_word_embeddings


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen3_moe-every-second", "gpt_neox", "gemma3", "llama"])
def test_a_checkpoint_that_keeps_the_names_of_the_live_model_is_understood(saved, name):
    model = saved(name).model
    live = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del live["lm_head.weight"]
    architecture = architecture_of(saved(name).config, live)
    assert architecture.expected_specs() == {key: shape for key, shape in live.items() if not architecture.ignores(key)}


@pytest.mark.parametrize(
    ("model_type", "leftover"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "h.3.attn.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    ],
)
def test_leftovers_of_old_releases_are_ignored(saved, model_type, leftover):
    architecture = saved(model_type).architecture
    assert architecture.ignores(leftover)
    assert not any(architecture.ignores(name) for name in architecture.expected_specs())


def test_switches_say_which_biases_they_add():
    for model_type, switch, role in [
        ("llama", "attention_bias", "o_proj"),
        ("llama", "mlp_bias", "down_proj"),
        ("qwen3", "attention_bias", "o_proj"),
        ("granite", "mlp_bias", "up_proj"),
        ("glm4", "attention_bias", "q_proj"),
        ("falcon", "bias", "down_proj"),
        ("gpt_neox", "attention_bias", "o_proj"),
    ]:
        assert architecture_of({"model_type": model_type}).bias_switch(role) == switch
    for model_type, role in [("qwen2", "q_proj"), ("qwen2", "o_proj"), ("glm4", "o_proj"), ("gpt2", "o_proj")]:
        assert architecture_of({"model_type": model_type}).bias_switch(role) is None


def test_roles_of_the_table_need_neither_torch_nor_transformers():
    code = (
        "import sys; from regraft.core.architectures import architecture_of;"
        "slot = architecture_of({'model_type': 'llama'}).slot('q_proj', 7);"
        "assert slot.tensor == 'model.layers.7.self_attn.q_proj.weight', slot;"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
