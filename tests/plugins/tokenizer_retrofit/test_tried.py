"""What every step tries in the model, whatever its class, and what it does where that is not possible."""

import json
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from regraft.core.errors import InputError, ResourceError, TransformationError, Unsupported
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit import TokenizerRetrofit, measured, rewrite
from regraft.plugins.tokenizer_retrofit.rows import Rows
from tests.plugins.tokenizer_retrofit import toys
from tests.running import regraft

TRIM = {"vocabulary": "trim", "size": None, "min_count": None}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
STORY = "recipes/hyperfit-story.txt"


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "nl.txt"
    path.write_text(toys.DUTCH)
    return path


def applied(folder, base, step):
    """The step by the command line, and whether anything was written."""
    recipe = folder / "recipe.toml"
    recipe.write_text(f'[base]\nmodel = "{base}"\n[[steps]]\nuse = "tokenizer-retrofit"\ncorpus = "nl.txt"\n{step}\n')
    return regraft("apply", recipe, "-o", folder / "out"), (folder / "out").exists()


def save_as(kind, folder, tokens="byte-bpe", **options):
    """A tiny model of the class `kind`, and a tokenizer."""
    toys.save("llama", folder, tokens)
    for file in folder.glob("*model*.safetensors"):
        file.unlink()
    made = getattr(transformers, kind)
    config = made.config_class(
        vocab_size=toys.backend(tokens).get_vocab_size(), pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **SMALL, **options,
    )  # fmt: skip
    made(config).save_pretrained(folder)
    return folder


def break_rows(monkeypatch, swap):
    """Rows that are not those of their tokens, past the check of copies."""
    whole = Rows.operation
    monkeypatch.setattr(Rows, "check_copies", lambda *_: None)
    monkeypatch.setattr(
        Rows, "operation", lambda self, *rest: whole(replace(self, parts=swap([*self.parts])), *rest)
    )  # fmt: skip


def one_wrong(parts):
    """A single row, that of a token that no text of the proof begins with, is another's."""
    parts[260] = parts[261]
    return parts


def two_exchanged(parts):
    parts[9], parts[10] = parts[10], parts[9]
    return parts


@pytest.mark.parametrize(("step", "swap"), [("size = 40", one_wrong), ('vocabulary = "trim"', two_exchanged)])
def test_a_wrong_row_fails_the_step_and_nothing_is_written(tmp_path, corpus, monkeypatch, step, swap):
    base = toys.save("llama", tmp_path / "base")
    break_rows(monkeypatch, swap)
    ran, written = applied(tmp_path, base, step)
    assert (ran.code, written) == (TransformationError.exit_code, False)
    assert "kept tokens have other logits than before" in ran.err
    ran, written = applied(tmp_path, base, f'{step}\nproof = "files"')
    assert (ran.code, written) == (0, True)


def test_an_id_without_a_token_that_is_the_likeliest_fails_the_step(tmp_path, corpus, monkeypatch):
    base = save_as("PhiForCausalLM", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.bias"] -= 50  # so that padding rows, of zeros, are the likeliest of all
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    _, _, patch = toys.retrofit(base, corpus, pad_to_multiple_of=64)
    assert patch.metrics["proof"]["greedy_tokens"] == 32
    whole = rewrite.metadata

    def forgetful(*given):
        changes = whole(*given)
        return replace(changes, json={name: own for name, own in changes.json.items() if "generation" not in name})

    monkeypatch.setattr(rewrite, "metadata", forgetful)
    ran, written = applied(tmp_path, base, "pad_to_multiple_of = 64")
    assert (ran.code, written) == (TransformationError.exit_code, False)
    assert "the model writes an id that is no token" in ran.err


def test_ids_without_a_token_that_the_base_writes_too_are_told(tmp_path, corpus):
    base = save_as("PhiForCausalLM", tmp_path / "base")
    tensors, rows = load_file(base / "model.safetensors"), 400
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        more = torch.zeros(rows - len(tensors[name]), *tensors[name].shape[1:])
        tensors[name] = torch.cat([tensors[name] - (50 if "bias" in name else 0), more])
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    _, _, patch = toys.retrofit(base, corpus)
    assert patch.metrics["proof"]["greedy_tokens"] == 0
    assert any("the base itself writes ids that are no tokens" in note for note in patch.notes)
    _, _, patch = toys.retrofit(base, corpus, **TRIM)
    assert patch.metrics["proof"]["greedy_tokens"] == 32


@pytest.mark.parametrize(
    ("kind", "tokens", "options", "compared"),
    [
        ("LlamaModel", "byte-bpe", {}, "kept_states"),
        ("LlamaForSequenceClassification", "byte-bpe", {"tie_word_embeddings": True}, "kept_states"),
        ("BertForPreTraining", "wordpiece", {}, "kept_logits"),
        ("XLMRobertaForMaskedLM", "unigram", {}, "kept_logits"),
        ("XLMRobertaForTokenClassification", "unigram", {}, "kept_states"),
    ],
)
def test_models_that_do_not_write_are_tried_by_what_they_compute(
    tmp_path, corpus, monkeypatch, kind, tokens, options, compared
):
    base = save_as(kind, tmp_path / "base", tokens, **options)
    _, _, patch = toys.retrofit(base, corpus)
    proof = patch.metrics["proof"]
    assert proof == {"model": kind, compared: proof[compared], "greedy_tokens": 0, "bits_per_byte": None}
    assert proof[compared] > 5
    with pytest.raises(Unsupported, match="does not predict"):
        toys.retrofit(base, corpus, max_bpb_increase=1)
    break_rows(monkeypatch, lambda parts: [*parts[1:], parts[0]])
    with pytest.raises(TransformationError, match="kept tokens have other"):
        toys.retrofit(base, corpus, **TRIM)


def test_tensors_that_the_class_leaves_alone_are_no_fault(tmp_path, corpus):
    base = save_as("BertForPreTraining", tmp_path / "base", "wordpiece")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    _, _, patch = toys.retrofit(base, corpus)
    assert patch.metrics["proof"]["model"] == "BertForMaskedLM"
    assert patch.metrics["proof"]["kept_logits"] > 5


def test_few_positions_are_not_exceeded(tmp_path, corpus):
    _, _, patch = toys.retrofit(toys.save("gpt2", tmp_path / "base", n_positions=24), corpus)
    assert patch.metrics["proof"]["greedy_tokens"] == 12
    assert patch.metrics["bpb_texts"] == "corpus"


def test_a_base_that_cannot_be_run_is_told_and_refused_where_that_matters(tmp_path, corpus):
    base = toys.save("llama", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    _, _, patch = toys.retrofit(base, corpus)
    assert "up_proj" in patch.metrics["proof"]["not_tried"]
    assert any("not tried in the model" in note for note in patch.notes)
    assert "not_tried" in patch.reports["retrofit.md"].read().decode()
    step, checkpoint = TokenizerRetrofit(), open_checkpoint(base)
    with pytest.raises(InputError, match="tensors that the checkpoint lacks"):
        step.apply(checkpoint, toys.params(corpus), Run("x", strict=True))
    with pytest.raises(InputError, match="tensors that the checkpoint lacks"):
        toys.retrofit(base, corpus, max_bpb_increase=1)


def test_a_result_that_does_not_load_or_run_fails_where_the_base_did(tmp_path, corpus, monkeypatch):
    base = toys.save("llama", tmp_path / "base")
    whole, alive = measured.load, []

    def second(change):
        alive.clear()

        def loads(*given, **options):
            assert not any(model() is not None for model in alive), "two models in memory"
            loaded = whole(*given, **options)
            loaded = change(loaded) if alive else loaded
            alive.append(weakref.ref(loaded.model))
            return loaded

        monkeypatch.setattr(measured, "load", loads)

    def unable(loaded):
        loaded.model.forward = lambda *_, **__: 1 / 0
        return loaded

    for change, message in [
        (lambda loaded: replace(loaded, unknown=frozenset({"x"})), "does not load as that with the old one did"),
        (unable, "with the new vocabulary cannot be run"),
    ]:
        second(change)
        with pytest.raises(TransformationError, match=message):
            toys.retrofit(base, corpus)


def test_code_of_a_checkpoint_does_not_run_untrusted(tmp_path, corpus):
    base = toys.save("llama", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported) as refusal:
        toys.retrofit(base, corpus)
    assert "trust_remote_code" in refusal.value.remedy
    assert 'proof = "files"' in refusal.value.remedy
    with pytest.raises(Unsupported) as refusal:
        toys.retrofit(base, corpus, max_bpb_increase=1)
    assert 'proof = "files"' not in refusal.value.remedy
    _, _, patch = toys.retrofit(base, corpus, proof="files")
    assert patch.metrics["proof"] == {"model": None, "not_tried": 'proof = "files"'}
    assert 'not tried in the model: proof = "files"' in patch.notes


def test_bits_per_byte_that_rise_by_more_than_they_may_fail_the_step():
    base, few = "demo:tiny", {"size": 64, "max_bpb_increase": 0.1}
    with pytest.raises(TransformationError, match="max_bpb_increase"):
        toys.retrofit(base, STORY, **{**few, "max_bpb_increase": 0.01})
    harm = {"steps": 4, "tokens": 64, "lr": 1.0, "warmup_steps": 0, "precision": "float32"}
    with pytest.raises(TransformationError, match="max_bpb_increase"):
        toys.retrofit(base, STORY, **few, adapt=harm)
    _, _, patch = toys.retrofit(base, STORY, **few, adapt=harm, held_out=STORY)
    assert patch.metrics["bpb_adapted"] > patch.metrics["bpb_initial"] + 0.1  # and so given up
    assert 0.01 < patch.metrics["bpb_initial"] - patch.metrics["bpb_before"] < 0.1


def test_without_a_corpus_built_in_texts_are_measured_and_no_words_counted(tmp_path):
    base = toys.save("llama", tmp_path / "base")
    _, _, patch = toys.retrofit(base, None, vocabulary="add-tokens", add=["<|x|>"], size=None, min_count=None)
    assert patch.metrics["bpb_texts"] == "built-in"
    assert patch.metrics["bpb_by_file"].keys() == {"built-in"}
    assert "tokens_per_word_before" not in patch.metrics, "there is no text to count words of"
    assert any("bits per byte of built-in texts" in note for note in patch.notes)


@pytest.mark.parametrize("key", [{"held_out": "x"}, {"adapt": {}}, {"max_bpb_increase": 0.5}])
def test_what_needs_the_model_is_refused_without_it(corpus, key):
    with pytest.raises(ValidationError, match=f"{next(iter(key))} needs the model"):
        toys.params(corpus, proof="files", **key)


def test_the_plan_counts_the_model_and_says_what_needs_less(tmp_path, corpus, monkeypatch):
    base = toys.save("llama", tmp_path / "base", num_hidden_layers=12, intermediate_size=1024)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    step, checkpoint = TokenizerRetrofit(), open_checkpoint(base)
    needed = {proof: step.plan(checkpoint, toys.params(corpus, proof=proof)).workspace_bytes
              for proof in ("model", "files")}  # fmt: skip
    assert needed["files"] < size < needed["model"]
    monkeypatch.setattr("regraft.core.requirements.available_memory", lambda: 1 << 20)
    ran, written = applied(tmp_path, base, "size = 40")
    assert (ran.code, written) == (ResourceError.exit_code, False)
    assert 'set proof = "files" in step tokenizer-retrofit' in ran.err
    ran, _ = applied(tmp_path, base, "size = 40\nmax_bpb_increase = 1")
    assert "proof" not in ran.err
