"""Families outside the table, derived from the stock class; and the table against the same derivation."""

import pytest

from regraft.core.architectures import Architecture, architecture_of
from regraft.core.architectures.derive import derive
from regraft.core.architectures.lookup import resolve
from regraft.core.errors import InputError, Unsupported
from tests.core.architectures.saved import write
from tests.families import FAMILIES, OUTSIDE_TABLE, VARIANTS, tiny

LLAMA_ROLES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
NORMS = {"input_norm", "mlp_norm"}


@pytest.mark.parametrize("name", OUTSIDE_TABLE)
def test_a_derived_family_expects_what_transformers_writes(saved, name):
    assert saved(name).architecture.expected_specs() == saved(name).shapes


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("starcoder2", (LLAMA_ROLES - {"gate_proj"}) | NORMS),
        ("stablelm", LLAMA_ROLES | NORMS),
        ("olmo", LLAMA_ROLES),  # its norms have no weights
    ],
)
def test_a_derived_family_has_its_roles(saved, name, roles):
    architecture = saved(name).architecture
    assert set(architecture.roles(1)) == roles
    assert {"embed_tokens", "lm_head"} <= set(architecture.roles())
    assert architecture.has("final_norm") == (name != "olmo")
    slot = architecture.slot("q_proj", 1)
    assert slot.tensor == slot.module + ".weight" == "model.layers.1.self_attn.q_proj.weight"
    assert (slot.bias is not None) == (name == "starcoder2")
    assert slot.whole
    assert architecture.head_rows("k_proj", 0, 1) == slice(16, 32)
    assert (architecture.num_heads, architecture.num_kv_heads, architecture.head_dim) == (4, 2, 16)
    assert architecture.slot("lm_head").tied == (name == "starcoder2")
    assert architecture.norm_offset is None


def test_a_derived_base_model_checkpoint_has_no_prefix(tmp_path):
    checkpoint = write(tiny("stablelm").base_model, tmp_path)
    assert checkpoint.architecture.expected_specs() == checkpoint.shapes
    assert checkpoint.architecture.headless


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_the_table_agrees_with_what_can_be_derived(saved, name):
    """The derivation reads the live module tree; where it finds a role at all, the table must say the same."""
    checkpoint = saved(name)
    family, extra = derive(checkpoint.config)
    derived = Architecture(resolve(family, checkpoint.config, frozenset(checkpoint.tensors)).layout, extra)
    table = checkpoint.architecture
    assert derived.expected_specs() == table.expected_specs()
    agreed = set()
    for layer in (None, *range(table.num_layers)):
        for role in derived.roles(layer):
            ours, theirs = table.slot(role, layer), derived.slot(role, layer)
            for fact in ("tensor", "shape", "rows", "bias", "transposed", "tied", "module"):
                assert getattr(ours, fact) == getattr(theirs, fact), (role, fact)
            agreed.add(role)
    assert {"embed_tokens", "o_proj", "final_norm"} <= agreed


@pytest.mark.parametrize(
    ("model_type", "roles"),
    [
        ("phi", {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "input_norm"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}),
        ("gptj", {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "input_norm"}),
        ("bloom", {"o_proj", "up_proj", "down_proj", "input_norm", "mlp_norm"}),
        ("gpt_bigcode", {"o_proj", "up_proj", "down_proj", "input_norm", "mlp_norm"}),
        ("qwen2_moe", {"q_proj", "k_proj", "v_proj", "o_proj", "input_norm", "mlp_norm"}),
        ("gpt_oss", {"q_proj", "k_proj", "v_proj", "o_proj", "input_norm", "mlp_norm"}),
        ("exaone4", LLAMA_ROLES | {"q_norm", "k_norm", "attention_output_norm", "mlp_output_norm"}),
        ("deepseek_v3", {"input_norm", "mlp_norm"}),
    ],
)
def test_other_architectures_give_what_their_tree_settles(tmp_path, model_type, roles):
    """Fused projections, experts and latent attention give no role, yet every tensor is expected."""
    checkpoint = write(stock(model_type), tmp_path)
    architecture = checkpoint.architecture
    assert architecture.expected_specs() == checkpoint.shapes
    assert set(architecture.roles(0)) == roles


def stock(model_type):
    """A tiny model of a family that has no fixture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "vocab_size": 64, "intermediate_size": 48, "max_position_embeddings": 32, "head_dim": 8, "ffn_dim": 48,
              "word_embed_proj_dim": 32, "rotary_dim": 4, "moe_intermediate_size": 24, "num_experts": 4,
              "num_local_experts": 4, "n_routed_experts": 4, "shared_expert_intermediate_size": 16, "n_group": 1,
              "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
              "qk_nope_head_dim": 4, "v_head_dim": 12}  # fmt: skip
    default = AutoConfig.for_model(model_type)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{key: value for key, value in wanted.items() if hasattr(default, key)})
    )


def test_what_the_tree_does_not_tell_is_refused(saved):
    family, _ = derive(saved("gpt_neox").config)
    fused = resolve(family, saved("gpt_neox").config, frozenset())
    assert fused.has("o_proj")
    with pytest.raises(Unsupported, match="stores q_proj") as refusal:
        fused.slot("q_proj", 0)
    assert "regraft_architectures" in refusal.value.remedy


def test_a_family_that_nobody_knows_is_refused_with_its_neighbours():
    with pytest.raises(Unsupported, match="neither regraft nor transformers") as refusal:
        architecture_of({"model_type": "lama"})
    assert "llama" in refusal.value.expected


def test_a_model_that_is_no_causal_language_model_is_refused():
    with pytest.raises(Unsupported, match="no causal language model"):
        architecture_of({"model_type": "vit"})


def test_a_config_that_the_stock_class_refuses_is_an_input_error():
    with pytest.raises(InputError, match="cannot build"):
        architecture_of({"model_type": "stablelm", "hidden_size": "wide"})
