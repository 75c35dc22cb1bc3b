"""Questions that have no answer, configs that contradict themselves, and families that plugins bring."""

from dataclasses import replace

import pytest

from regraft.core.architectures import Family, architecture_of, embedding, head, linear, norm
from regraft.core.architectures.families import built_in
from regraft.core.errors import InputError, PluginError, Unsupported, UsageError

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_a_role_that_the_family_lacks_is_refused():
    with pytest.raises(Unsupported, match="stores q_norm") as refusal:
        architecture_of(LLAMA).slot("q_norm", 0)
    assert "q_proj" in refusal.value.expected


@pytest.mark.parametrize("layer", [2, -1, 40])
def test_a_layer_that_does_not_exist_is_named(layer):
    with pytest.raises(UsageError, match=f"there is no layer {layer}") as refusal:
        architecture_of(LLAMA).slot("q_proj", layer)
    assert refusal.value.expected == "0 to 1"


def test_layers_are_asked_for_where_they_matter():
    llama = architecture_of(LLAMA)
    with pytest.raises(UsageError, match="role of the layers"):
        llama.slot("q_proj")
    with pytest.raises(UsageError, match="outside the layers"):
        llama.slot("lm_head", 0)
    with pytest.raises(UsageError, match="no experts"):
        llama.slot("up_proj", 0, 3)


def test_heads_are_counted():
    llama = architecture_of(LLAMA)
    assert llama.head_rows("v_proj", 0, 1) == slice(4, 8)
    with pytest.raises(UsageError, match="no head of v_proj 2"):
        llama.head_rows("v_proj", 0, 2)
    with pytest.raises(UsageError, match="head_columns"):
        llama.head_rows("o_proj", 0, 0)
    with pytest.raises(UsageError, match="no head 4"):
        llama.head_columns(4)
    assert [llama.kv_head_of(head) for head in range(4)] == [0, 0, 1, 1]


def test_experts_are_asked_for_where_they_matter():
    mixture = architecture_of({"model_type": "mixtral", "num_local_experts": 4})
    with pytest.raises(UsageError, match="every expert"):
        mixture.slot("up_proj", 0)
    with pytest.raises(UsageError, match="no expert 4"):
        mixture.slot("up_proj", 0, 4)
    assert mixture.slot("up_proj", 0, 3).tensor == "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    dense = architecture_of({"model_type": "qwen3_moe", "mlp_only_layers": [1]})
    assert dense.slot("up_proj", 1).shape == (6144, 2048)
    with pytest.raises(Unsupported, match="stores router"):
        dense.slot("router", 1)


def test_a_head_that_was_not_saved_is_refused():
    names = ["embed_tokens.weight", "norm.weight"]
    with pytest.raises(Unsupported, match="without an output head"):
        architecture_of(LLAMA, names).slot("lm_head")


def test_tied_heads_are_one_tensor_whichever_is_stored():
    tied = {**LLAMA, "tie_word_embeddings": True}
    for stored in ("model.embed_tokens.weight", "lm_head.weight"):
        architecture = architecture_of(tied, [stored, "model.norm.weight"])
        slots = [architecture.slot(role) for role in ("embed_tokens", "lm_head")]
        assert [slot.tensor for slot in slots] == [stored, stored]
        assert all(slot.tied for slot in slots)
        assert stored in architecture.expected_specs()
        assert len({"model.embed_tokens.weight", "lm_head.weight"} & set(architecture.expected_specs())) == 1


def test_a_stored_head_beside_a_tied_flag_is_its_own_tensor_but_not_expected():
    architecture = architecture_of(
        {**LLAMA, "tie_word_embeddings": True}, ["model.embed_tokens.weight", "lm_head.weight"]
    )
    assert architecture.slot("lm_head").tensor == "lm_head.weight"
    assert not architecture.slot("lm_head").tied
    assert "lm_head.weight" not in architecture.expected_specs()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"hidden_size": "16"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"intermediate_size": 1.5}, "intermediate_size"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "gemma3", "text_config": [1]}, "text_config"),
    ],
)
def test_configs_that_make_no_sense_name_the_key(changes, key):
    with pytest.raises(InputError) as refusal:
        architecture_of({**LLAMA, **changes}).expected_specs()
    assert refusal.value.where == f"config.json: {key}"
    assert refusal.value.remedy


def test_tensors_of_another_family_are_refused():
    with pytest.raises(InputError, match="not those of a llama model") as refusal:
        architecture_of(LLAMA, ["transformer.wte.weight", "transformer.h.0.ln_1.weight", "a", "b"])
    assert refusal.value.expected == "model.embed_tokens.weight or embed_tokens.weight"
    assert "and 1 more" in refusal.value.found


def test_deriving_can_be_forbidden():
    with pytest.raises(Unsupported, match="not in regraft's table") as refusal:
        architecture_of({"model_type": "olmo"}, derive=False)
    assert "olmo2" in refusal.value.expected
    assert architecture_of(LLAMA, derive=False).num_layers == 2


TOY = Family(
    model_type="toy",
    parts=(
        embedding("tokens", "embed_tokens"),
        norm("blocks.{layer}.norm", "input_norm"),
        linear(
            "blocks.{layer}.qkv", q_proj="q_size", k_proj="kv_size", v_proj="kv_size", bias="use_bias", interleaved=True
        ),
        linear("blocks.{layer}.out", o_proj="hidden_size", columns="q_size"),
        head("output", stored=("unembed",)),
    ),
    defaults={"use_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 2},
    base="body",
    aliases={"hidden_size": ("width",)},
)
TOY_CONFIG = {"model_type": "toy", "width": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 8}


def test_a_plugin_describes_a_family_of_its_own():
    architecture = architecture_of(TOY_CONFIG, families=[TOY])
    assert architecture.expected_specs() == {
        "body.tokens.weight": (8, 16),
        "unembed.weight": (8, 16),
        "body.blocks.0.norm.weight": (16,),
        "body.blocks.0.qkv.weight": (32, 16),
        "body.blocks.0.qkv.bias": (32,),
        "body.blocks.0.out.weight": (16, 16),
    }
    assert architecture.rows_of("k_proj", 0) == [8, 9, 10, 11, 24, 25, 26, 27]
    assert architecture.head_rows("q_proj", 0, 3) == slice(20, 24)
    assert architecture.bias_switch("v_proj") == "use_bias"
    assert architecture.slot_of_module("body.blocks.0.qkv").tensor == "body.blocks.0.qkv.weight"


def test_a_plugins_row_replaces_a_built_in_one():
    wider = replace(built_in()["llama"], defaults={**built_in()["llama"].defaults, "mlp_bias": True})
    names = architecture_of(LLAMA, families=[wider]).expected_specs()
    assert "model.layers.0.mlp.up_proj.bias" in names
    assert "model.layers.0.mlp.up_proj.bias" not in architecture_of(LLAMA).expected_specs()


def test_a_size_that_a_plugins_family_forgets_is_the_plugins_fault():
    broken = replace(TOY, parts=(*TOY.parts, linear("blocks.{layer}.up", up_proj="ffn_width")))
    with pytest.raises(PluginError, match="does not define") as refusal:
        architecture_of(TOY_CONFIG, families=[broken]).expected_specs()
    assert refusal.value.found == "ffn_width"
