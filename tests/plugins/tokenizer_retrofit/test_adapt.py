"""Training of the new rows, and bits per byte."""

import json
import math

import pytest
import torch

from regraft.core.training.head import Head
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.bits import bits_per_byte
from regraft.plugins.tokenizer_retrofit.passages import passages
from tests.plugins.tokenizer_retrofit import toys


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "nl.txt"
    path.write_text(toys.DUTCH)
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_only_new_rows_learn_and_bits_per_byte_fall(tmp_path, corpus, tied):
    folder = toys.save("llama", tmp_path / "base", tie_word_embeddings=tied)
    adapt = {"steps": 12, "tokens": 64, "lr": 0.01, "epochs": 4, "warmup_steps": 1, "precision": "float32"}
    before, after, patch = toys.retrofit(folder, corpus, adapt=adapt, held_out=corpus)
    rows = before.config["vocab_size"]
    assert patch.metrics["bpb_adapted"] < patch.metrics["bpb_initial"]
    names = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert {*patch.edits} == names
    composed = json.loads(patch.reports["id_map.json"].read())["composed_of"]
    for name in names:
        old, new = before.load(name), after.load(name)
        assert torch.equal(old, new[:rows])
        means = torch.stack([old[parts].mean(0) for parts in composed.values()])
        assert not torch.allclose(new[rows : rows + len(means)], means, atol=1e-4)
    assert {"loss.png", "losses.jsonl"} <= patch.reports.keys()


def test_rows_that_did_not_help_stay_as_made(tmp_path, corpus):
    folder = toys.save("llama", tmp_path / "base")
    adapt = {"steps": 6, "tokens": 64, "lr": 30.0, "warmup_steps": 0, "precision": "float32"}
    before, after, patch = toys.retrofit(folder, corpus, adapt=adapt, held_out=corpus)
    name = "model.embed_tokens.weight"
    composed = json.loads(patch.reports["id_map.json"].read())["composed_of"]
    for index, parts in composed.items():
        torch.testing.assert_close(after.load(name)[int(index)], before.load(name)[parts].mean(0))
    assert any("did not help" in note for note in patch.notes)


def test_a_uniform_model_has_as_many_bits_as_its_vocabulary_and_the_tokens_say(tmp_path):
    folder = toys.save("llama", tmp_path / "base")
    from regraft.core.sources.open import open_checkpoint

    run, checkpoint = Run("x"), open_checkpoint(folder)
    model, tokenizer = run.model(checkpoint), run.tokenizer(checkpoint)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    texts = passages([toys.DUTCH])
    assert "".join(texts) == toys.DUTCH
    assert max(len(text.encode()) for text in texts) <= 700
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    wanted = math.log2(model.config.vocab_size) * tokens / len(toys.DUTCH.encode())
    assert bits_per_byte(Head.of(model), tokenizer, texts, "cpu") == pytest.approx(wanted, rel=1e-6)
