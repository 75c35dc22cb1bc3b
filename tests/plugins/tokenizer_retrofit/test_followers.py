"""What goes by the old ids beside the tables of the vocabulary is refused by name, through `apply`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.errors import Unsupported
from tests.plugins.tokenizer_retrofit import toys
from tests.running import regraft

WIDTH = 64
CAPITAL = torch.ones(320, WIDTH)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("followers")
    (folder / "nl.txt").write_text(toys.DUTCH)
    return toys.save("llama", folder / "base")


def applied(base, *steps):
    """Exit code and words of `apply`, which is to leave nothing behind."""
    folder = base.parent
    (folder / "recipe.toml").write_text(f'[base]\nmodel = "base"\n{"".join(map("[[steps]]{}".format, steps))}')
    ran = regraft("apply", folder / "recipe.toml", "-o", folder / "out")
    assert "Traceback" not in ran.err
    assert not (folder / "out").exists()
    return ran.code, ran.err


EXTEND = '\nuse = "tokenizer-retrofit"\ncorpus = "nl.txt"\nsize = 20\nmin_count = 2\n'


@pytest.mark.parametrize(
    ("extra", "config", "words"),
    [
        ({"model.embed_tokens_per_layer.weight": CAPITAL[:300]}, {"vocab_size_per_layer_input": 300}, "every layer"),
        ({"model.layers.2.embed_tokens.weight": CAPITAL}, {"num_nextn_predict_layers": 1}, "further tokens"),
        ({"model.layers.2.shared_head.head.weight": CAPITAL}, {"num_nextn_predict_layers": 1}, "further tokens"),
        ({"medusa_head.0.1.weight": CAPITAL}, {}, "further tokens"),
        ({"fc.weight": CAPITAL}, {}, "a draft for another model"),
        ({"d2t": torch.zeros(100, dtype=torch.int64)}, {"draft_vocab_size": 100}, "a draft for another model"),
        ({"model.vocabulary_bias": torch.zeros(320)}, {}, "another tensor may have a row"),
        ({"model.turned": CAPITAL.T.contiguous()}, {}, "another tensor may have a row"),
    ],
)
def test_other_tables_of_the_old_ids_are_refused_and_nothing_is_written(base, extra, config, words):
    weights, settings = base / "model.safetensors", base / "config.json"
    kept = weights.read_bytes(), settings.read_bytes()
    save_file({**load_file(weights), **extra}, weights, {"format": "pt"})
    settings.write_text(json.dumps({**json.loads(kept[1]), **config}))
    try:
        code, said = applied(base, EXTEND)
    finally:
        weights.write_bytes(kept[0])
        settings.write_bytes(kept[1])
    assert code == 1
    assert words in said
    assert any(name in said for name in (*extra, *config))


def test_adapters_trained_on_the_old_ids_are_refused(base):
    beside = base / "adapter_config.json"
    beside.write_text("{}")
    try:
        code, said = applied(base, EXTEND)
    finally:
        beside.unlink()
    assert code == 1
    assert "an adapter lies beside the weights" in said
    folder = base.parent / "adapter"
    folder.mkdir()
    prefix = "base_model.model.model.embed_tokens"
    for settings, tensors, words in [
        ({"trainable_token_indices": [3]}, {f"{prefix}.token_adapter.trainable_tokens_delta": CAPITAL[:1]},
         "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, {f"{prefix}.lora_embedding_A": CAPITAL.T[:4].contiguous(),
                                                f"{prefix}.lora_embedding_B": CAPITAL[:WIDTH, :4].contiguous()}, "320"),
        ({"modules_to_save": ["embed_tokens"]}, {f"{prefix}.weight": CAPITAL}, "320"),
    ]:  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, **settings}))
        save_file(tensors, folder / "adapter_model.safetensors")
        code, said = applied(base, EXTEND, '\nuse = "lora-merge"\nadapter = "adapter"\n')
        assert code in (1, 3)
        assert words in said
        (folder.parent / "recipe.toml").write_text(f'[base]\nmodel = "adapter"\n[[steps]]{EXTEND}')
        ran = regraft("apply", folder.parent / "recipe.toml", "-o", folder.parent / "out")
        assert ran.code == 3
        assert "the folder is an adapter, no model" in ran.err
        assert not (folder.parent / "out").exists()


def test_a_second_vocabulary_in_one_recipe_is_refused_by_name(base):
    for step in (f'\nid = "again"{EXTEND}', '\nuse = "large-vocabulary"\nprobes = 1\n'):
        code, said = applied(base, EXTEND, step)
        assert code == 1
        assert "a step before makes a tokenizer" in said
        assert "a recipe of its own" in said


def test_heads_that_share_the_tables_and_sizes_alike_by_chance_are_no_hindrance(tmp_path):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save("llama", tmp_path / "base", intermediate_size=320, max_position_embeddings=320)
    file = folder / "model.safetensors"
    further = {"mtp.fc.weight": torch.ones(WIDTH, 2 * WIDTH), "mtp.norm.weight": torch.ones(WIDTH)}
    save_file({**load_file(file), **further}, file, {"format": "pt"})
    before, after, patch = toys.retrofit(folder, corpus)
    assert before.specs["model.layers.0.mlp.up_proj.weight"].shape == (320, WIDTH)
    assert patch.edits.keys() == {"model.embed_tokens.weight", "lm_head.weight"}
    assert further.keys() <= after.specs.keys()


@pytest.mark.parametrize("family", ["gemma3n_text", "deepseek_v3"])
def test_stock_models_with_more_tables_are_refused(tmp_path, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save("llama", tmp_path / "base")
    common = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
              "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1}  # fmt: skip
    own = {
        "gemma3n_text": {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 4, "laurel_rank": 2,
                         "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2, "altup_num_inputs": 2,
                         "activation_sparsity_pattern": [0.0, 0.0]},
        "deepseek_v3": {"num_nextn_predict_layers": 1, "first_k_dense_replace": 2, "q_lora_rank": 4, "kv_lora_rank": 4,
                        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 2},
    }[family]  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**common, **own}))
    model.save_pretrained(folder)
    if family == "deepseek_v3":
        toys.retrofit(folder, corpus)
        file = folder / "model.safetensors"
        save_file({**load_file(file), "model.layers.2.shared_head.head.weight": torch.ones(320, 16)}, file,
                  {"format": "pt"})  # fmt: skip
    with pytest.raises(Unsupported, match=r"shared_head|embed_tokens_per_layer"):
        toys.retrofit(folder, corpus)
