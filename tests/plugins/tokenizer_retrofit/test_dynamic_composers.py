"""Rows of merged tokens in `dynamic-tokenization`: from a table made beforehand, or from a hypernetwork."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from regraft.core.errors import InputError, Unsupported
from regraft.core.sources.hub import with_runtimes
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.dynamic import DynamicTokenization as Step
from regraft.plugins.tokenizer_retrofit.dynamic.params import DynamicTokenizationParams
from regraft.plugins.tokenizer_retrofit.hypernet import open_hypernet, predict
from tests.plugins.tokenizer_retrofit import test_hypernet, toys
from tests.plugins.tokenizer_retrofit.dynamic import PROMPTS, applied, language_model, runtime, without_regraft
from tests.running import done, tree, write_recipe


@pytest.fixture(scope="module")
def base(folder):
    return toys.save("llama", folder / "base")


def test_rows_of_the_table_are_used_for_the_tokens_that_it_has(folder, base):
    made = applied(folder, base, "tabled", merges=400, corpus="corpus.txt", composer="table", table_size=30)
    table = load_file(made / "dynamic_tokenization" / "composer.safetensors")
    ends = table["ends"].tolist()
    data = bytes(table["bytes"].tolist())
    tokens = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert len(tokens) == len(set(tokens)) == len(table["rows"]) == 30
    model = language_model(made)
    dynamic = runtime(made).DynamicTokenization(model)
    rows = dynamic.composer.rows(tokens)
    for token, row in zip(tokens, table["rows"], strict=True):
        assert torch.equal(rows[token], row)
    weight = model.get_input_embeddings().weight
    means = [weight[list(dynamic.merger.spelling.ids(token))].mean(0) for token in tokens]
    assert any(not torch.allclose(mean, rows[token], atol=1e-4) for mean, token in zip(means, tokens, strict=True))
    batch = dynamic.encode_batch([toys.DUTCH])
    places = [place for place, token in enumerate(batch.tokens[0]) if token.data in tokens]
    assert places
    for place in places:
        assert torch.equal(batch.inputs_embeds[0, place], rows[batch.tokens[0][place].data])
    (made / "dynamic_tokenization" / "composer.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        runtime(made).DynamicTokenization(model)


def test_a_second_policy_takes_the_place_of_the_first_with_its_table(folder, base):
    first = {"use": "dynamic-tokenization", "merges": 4, "corpus": "corpus.txt", "composer": "table", "table_size": 9}
    second = {"use": "dynamic-tokenization", "id": "second", "merges": 3}
    done("apply", write_recipe(folder / "twice.toml", base, first, second), "-o", folder / "twice")
    assert "dynamic_tokenization/composer.safetensors" not in tree(folder / "twice")
    policy = json.loads((folder / "twice" / "dynamic_tokenization" / "policy.json").read_text())
    assert (policy["merges"], policy["composer"]) == (3, "mean")


def test_gemma_scales_the_rows_of_a_table_as_its_own(folder):
    base = toys.save("gemma3_text", folder / "gemma", kind="piece-bpe")
    made = applied(folder, base, "gemma-tabled", merges=50, corpus="corpus.txt", composer="table", table_size=20)
    model = language_model(made)
    dynamic = runtime(made).DynamicTokenization(model)
    table = load_file(made / "dynamic_tokenization" / "composer.safetensors")
    token = bytes(table["bytes"][: table["ends"][0]].tolist())
    scale = float(model.get_input_embeddings().embed_scale)
    assert scale > 1
    assert torch.allclose(dynamic.composer.rows([token])[token], table["rows"][0] * scale)


@pytest.mark.parametrize(
    "changes",
    [{}, {"separate_out_embeddings": True, "hn_predict_bias": True}, {"hn_concat_last_hidden_state": True},
     {"hn_embed_lang_id": True, "n_langs": 3}],
    ids=["tied", "separate", "concatenated", "language"],
)  # fmt: skip
def test_a_carried_hypernetwork_predicts_what_the_trainers_does(folder, base, tmp_path, changes):
    separate = "separate_out_embeddings" in changes
    settings = {"folder": str(test_hypernet.save(tmp_path / "net", **changes))}
    if "n_langs" in changes:
        settings["language"] = 2
    if separate:
        base = toys.save("llama", tmp_path / "untied", tie_word_embeddings=False)
    made, step = tmp_path / "made", Step()
    given = DynamicTokenizationParams.model_validate({"merges": 50, "composer": "hypernet", "hypernet": settings})
    patch = step.apply(open_checkpoint(base), given, Run("dynamic"))
    assert step.plan(open_checkpoint(base), given).deviations(patch) == []
    shutil.copytree(base, made)
    (made / "dynamic_tokenization").mkdir()
    for name, file in patch.files.items():
        file.copy_to(made / name)
    model = language_model(made)
    dynamic = runtime(made).DynamicTokenization(model)
    batch = dynamic.encode_batch(PROMPTS)
    merged = [(row, place - len(text), token.data) for row, text in enumerate(batch.tokens)
              for place, token in enumerate(text) if len(token.ids) > 1]  # fmt: skip
    spelled = [dynamic.merger.spelling.ids(data) for _, _, data in merged]
    assert max(map(len, spelled)) > test_hypernet.CONFIG["hn_surface_maxlen"]
    tables = [model.get_input_embeddings().weight, *([model.get_output_embeddings().weight] if separate else [])]
    network = open_hypernet(tmp_path / "net")
    wanted, _, _ = predict(network, spelled, torch.cat(tables, 1).detach(), settings.get("language"))
    found = torch.stack([batch.inputs_embeds[row, place] for row, place, _ in merged])
    torch.testing.assert_close(found, wanted)
    if not changes:
        assert without_regraft(made) == "1"


def test_hypernetworks_of_other_models_are_refused(tmp_path):
    base = toys.save("llama", tmp_path / "tied", tie_word_embeddings=True)
    for name, changes, words in (
        ("narrow", {"n_embd": 32}, "another model"),
        ("separate", {"separate_out_embeddings": True}, "a head of its own"),
        ("lingual", {"hn_embed_lang_id": True, "n_langs": 3}, "reads a language"),
    ):
        settings = {"folder": str(test_hypernet.save(tmp_path / name, **changes))}
        given = DynamicTokenizationParams.model_validate({"merges": 5, "composer": "hypernet", "hypernet": settings})
        with pytest.raises((InputError, Unsupported), match=words):
            Step().apply(open_checkpoint(base), given, Run("dynamic"))


def test_the_table_survives_another_rewrite_and_the_hub(folder, base, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    first = {"use": "dynamic-tokenization", "merges": 4, "corpus": "corpus.txt", "composer": "table", "table_size": 9}
    done("apply", write_recipe(folder / "tabled-once.toml", base, first), "-o", folder / "tabled-once")
    again = write_recipe(folder / "rewritten.toml", folder / "tabled-once", dtype="float16")
    done("apply", again, "-o", folder / "rewritten")
    name = "dynamic_tokenization/composer.safetensors"
    assert (folder / "rewritten" / name).read_bytes() == (folder / "tabled-once" / name).read_bytes()
    runtime(folder / "rewritten").DynamicTokenization(language_model(folder / "rewritten"))
    names = [*tree(folder / "tabled-once"), "other/model.safetensors", "dynamic_tokenization/weights.bin"]
    fetched = set(filter_repo_objects(names, **with_runtimes(names)))
    assert {name, "dynamic_tokenization/runtime.py", "model.safetensors"} <= fetched
    assert not fetched & {"other/model.safetensors", "dynamic_tokenization/weights.bin"}


def test_xlm_r_with_a_table_is_read_as_ever_without_merges(folder):
    from transformers import (
        AutoModelForTokenClassification,
        PreTrainedTokenizerFast,
        XLMRobertaConfig,
        XLMRobertaForTokenClassification,
    )

    tokenizer = toys.backend("unigram")
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=200, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    XLMRobertaForTokenClassification(config).save_pretrained(folder / "xlmr")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder / "xlmr"
    )
    made = applied(folder, folder / "xlmr", "xlmr-dynamic", merges=9, corpus="corpus.txt", composer="table")
    model = AutoModelForTokenClassification.from_pretrained(made).eval()
    module = runtime(made)
    ids = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    plain = module.DynamicTokenization(model, merges=0).encode_batch(PROMPTS)
    width = max(map(len, ids))
    padded = torch.tensor([[*one, *[0] * (width - len(one))] for one in ids])
    with torch.no_grad():
        native = model(padded, attention_mask=(padded != 0).long()).logits
        assert torch.allclose(model(**plain.inputs()).logits[0], native[0], atol=1e-6)
        assert torch.allclose(model(**plain.inputs()).logits[1, : len(ids[1])], native[1, : len(ids[1])], atol=1e-6)
    shorter = module.DynamicTokenization(model).encode_batch(PROMPTS)
    assert shorter.attention_mask.sum() < plain.attention_mask.sum()
    assert all(
        b"".join(text).strip().decode() == prompt for text, prompt in zip(shorter.token_bytes, PROMPTS, strict=True)
    )
