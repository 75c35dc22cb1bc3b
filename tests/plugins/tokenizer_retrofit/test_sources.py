"""Vocabularies that replace the old one, parts of it, and tokens added to it."""

import json
import shutil

import pytest
import torch
from pydantic import ValidationError

from regraft.core.errors import InputError, TransformationError, Unsupported, UsageError
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.donor import replace_by_donor
from regraft.plugins.tokenizer_retrofit.spell import Speller
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.train import train
from regraft.plugins.tokenizer_retrofit.trim import trim
from tests.plugins.tokenizer_retrofit import toys

HARD = ["\x04\x06", "a\x13b", "\U00040000", "naïve\u00a0café", "A\u030a Å", "x\r\ny\t\tz", "猫が12", " <s> ", ""]


def file_of(kind):
    return TokenizerFile.parse(json.loads(toys.backend(kind).to_str()), kind)


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "nl.txt"
    path.write_text(toys.DUTCH)
    return path


@pytest.mark.parametrize("kind", toys.KINDS)
def test_every_line_of_the_corpus_is_cut_as_before_by_a_trimmed_vocabulary(kind):
    old = file_of(kind)
    text = "And the beginning was with the word.\n\nThe word was:\tmade; 12 of them.\n"
    new = trim(old, [text])
    assert new.tokenizer.rows < old.rows
    before, after = old.backend(), new.tokenizer.backend()
    for line in text.splitlines(keepends=True):
        assert [new.origins[index].kept for index in ids(after, line)] == ids(before, line)
    assert {token.content for token in old.added} <= new.tokenizer.ids.keys()


def test_a_trimmed_vocabulary_without_one_token_of_the_closure_cuts_otherwise():
    old = file_of("byte-bpe")
    new = trim(old, [toys.ENGLISH])
    before = old.backend()
    inner = {part for pair in new.tokenizer.merges for part in pair if len(part) > 1}
    used = {old.tokens[index] for index in ids(before, toys.ENGLISH)}
    passed_only = sorted(inner - used)
    assert passed_only
    broken = dict(new.tokenizer.document)
    merges = [pair for pair in new.tokenizer.merges if passed_only[0] not in (*pair, "".join(pair))]
    broken["model"] = {**broken["model"], "merges": [list(pair) for pair in merges]}
    cut = ids(TokenizerFile.parse(broken, "broken").backend(), toys.ENGLISH)
    assert [new.origins[index].kept for index in cut] != ids(before, toys.ENGLISH)


def test_other_texts_are_still_written_in_smaller_pieces():
    old = file_of("byte-bpe")
    after = trim(old, ["the word"]).tokenizer.backend()
    for text in [toys.DUTCH, *HARD]:
        assert after.decode(ids(after, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trimmed_model_has_the_logits_of_the_tokens_that_stay(tmp_path, family):
    text = tmp_path / "en.txt"
    text.write_text("In the beginning was the word")
    before, after, patch = toys.retrofit(
        toys.save(family, tmp_path / "base"), text, vocabulary="trim", size=None, min_count=None
    )
    kept = [
        old for old, new in enumerate(json.loads(patch.reports["id_map.json"].read())["old_to_new"]) if new is not None
    ]
    rows = after.config["vocab_size"]
    assert len(kept) == rows < before.config["vocab_size"]
    for name in patch.edits:
        assert torch.equal(after.load(name), before.load(name)[kept])
    run = Run("x")
    cut = [run.tokenizer(one)("In the beginning", return_tensors="pt")["input_ids"] for one in (before, after)]
    with torch.inference_mode():
        old, new = run.model(before)(cut[0]).logits, run.model(after)(cut[1]).logits
    torch.testing.assert_close(new, old[..., kept], atol=1e-4, rtol=0)


def test_configs_name_the_same_tokens_after_ids_moved(tmp_path):
    folder = toys.save("llama", tmp_path / "base")
    document = json.loads((folder / "tokenizer.json").read_text())
    last = max(document["model"]["vocab"].values())
    document["added_tokens"].append({**document["added_tokens"][0], "id": last + 1, "content": "<|stop|>"})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "two").mkdir()
    wider = toys.save("llama", tmp_path / "wide", rows=last + 2)
    shutil.copy(folder / "tokenizer.json", wider / "tokenizer.json")
    generation = {"eos_token_id": [2, last + 1], "suppress_tokens": [last + 1], "bos_token_id": 1}
    (wider / "generation_config.json").write_text(json.dumps(generation))
    text = tmp_path / "en.txt"
    text.write_text("the word")
    _, after, _ = toys.retrofit(wider, text, vocabulary="trim", size=None, min_count=None)
    stop = after.config["vocab_size"] - 1
    assert stop < last
    assert after.generation_config["eos_token_id"] == [2, stop]
    assert after.generation_config["suppress_tokens"] == [stop]
    assert Run("x").tokenizer(after).convert_tokens_to_ids("<|stop|>") == stop


@pytest.mark.parametrize(
    ("kind", "algorithm"),
    [("byte-bpe", "bpe"), ("byte-bpe", "longest-match"), ("piece-bpe", "bpe"), ("piece-bpe", "unigram"),
     ("unigram", "bpe"), ("unigram", "unigram")],
)  # fmt: skip
def test_a_trained_vocabulary_loses_no_text_and_keeps_special_ids(kind, algorithm):
    old = file_of(kind)
    new = train(old, [toys.DUTCH], size=420, algorithm=algorithm, min_count=2)
    before, after = old.backend(), new.tokenizer.backend()
    assert len(ids(after, toys.DUTCH)) < 0.8 * len(ids(before, toys.DUTCH))
    for text in [toys.DUTCH.splitlines()[0], *HARD[:-2]]:
        assert after.decode(ids(after, text), skip_special_tokens=False) == text
    for token in old.added:
        assert new.tokenizer.ids[token.content] == token.id
        assert new.origins[token.id].kept == token.id
    assert after.encode("x").ids[0] == 1
    assert len(new.origins) == new.tokenizer.rows <= 420


def test_composed_rows_are_spelt_by_old_tokens_that_have_the_same_bytes():
    old = file_of("byte-bpe")
    new = train(old, [toys.DUTCH], size=400, min_count=2)
    composed = [(index, origin) for index, origin in enumerate(new.origins) if origin.kept is None]
    assert len(composed) > 50
    for index, origin in composed:
        spelt = b"".join(old.bytes_of(old.tokens[part]) for part in origin.parts)
        assert spelt == new.tokenizer.bytes_of(new.tokenizer.tokens[index])
    for index, origin in enumerate(new.origins):
        if origin.kept is not None:
            assert old.bytes_of(old.tokens[origin.kept]) == new.tokenizer.bytes_of(new.tokenizer.tokens[index])


def test_pieces_and_byte_level_tokens_are_compared_by_bytes():
    old, donor = file_of("piece-bpe"), file_of("byte-bpe")
    speller = Speller(old)
    origins = speller.origins(donor, donor.rows)
    index = donor.ids["Ġthe"]
    assert old.tokens[origins[index].kept] == "\u2581the"
    for token, index in donor.vocab.items():
        if token in donor.verbatim or (origins[index].kept is None and not origins[index].parts):
            continue
        parts = [origins[index].kept] if origins[index].kept is not None else origins[index].parts
        assert b"".join(old.bytes_of(old.tokens[part]) for part in parts) == donor.bytes_of(token)


@pytest.mark.parametrize("kind", toys.KINDS)
def test_its_own_tokenizer_as_donor_changes_nothing(kind):
    old = file_of(kind)
    new = replace_by_donor(old, old)
    assert new.tokenizer.ids == old.ids
    assert [origin.kept for origin in new.origins] == list(range(old.rows))


def test_padding_and_truncation_stay_ours_under_the_ids_of_a_donor():
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_type_id": 0, "pad_to_multiple_of": None}
    own, other = file_of("byte-bpe"), file_of("piece-bpe")
    token = own.tokens[1]
    ours = {**own.document, "padding": {**padding, "pad_token": token, "pad_id": 1}, "truncation": None}
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    theirs = {**other.document, "padding": {**padding, "pad_token": other.tokens[2], "pad_id": 2}, "truncation": cut}
    new = replace_by_donor(TokenizerFile.parse(ours, "ours"), TokenizerFile.parse(theirs, "theirs")).tokenizer
    assert new.document["padding"] == {**padding, "pad_token": token, "pad_id": new.ids[token]}
    assert new.document["truncation"] is None


@pytest.mark.parametrize(("kind", "donor"), [("byte-bpe", "piece-bpe"), ("piece-bpe", "byte-bpe")])
def test_a_donor_brings_its_words_and_our_special_tokens_stay(tmp_path, kind, donor):
    folder = toys.save("llama", tmp_path / "base", kind)
    toys.save("llama", tmp_path / "donor", donor)
    before, after, patch = toys.retrofit(
        folder, None, vocabulary="replace-donor", donor=tmp_path / "donor", size=None, min_count=None
    )
    run = Run("x")
    one, other = run.tokenizer(before), run.tokenizer(after)
    assert other.eos_token == one.eos_token
    assert after.config["eos_token_id"] == other.eos_token_id
    words = toys.backend(donor).encode("the beginning", add_special_tokens=False).tokens
    assert other.tokenize("the beginning") == words
    kept = json.loads(patch.reports["id_map.json"].read())["old_to_new"]
    table, new = (checkpoint.load("model.embed_tokens.weight") for checkpoint in (before, after))
    for old_id, new_id in enumerate(kept):
        if new_id is not None:
            assert torch.equal(table[old_id], new[new_id])


def test_a_donor_that_cannot_write_every_text_is_refused(tmp_path):
    folder = toys.save("llama", tmp_path / "base")
    toys.save("llama", tmp_path / "donor", "unigram")
    options = {"donor": tmp_path / "donor", "size": None, "min_count": None}
    with pytest.raises(TransformationError, match="decoded worse"):
        toys.retrofit(folder, None, vocabulary="replace-donor", **options)


def test_added_tokens_are_matched_verbatim_and_have_rows(tmp_path):
    folder = toys.save("llama", tmp_path / "base")
    before, after, _ = toys.retrofit(
        folder, None, vocabulary="add-tokens", add=["<|tool|>", "<|end tool|>"], size=None, min_count=None
    )
    tokenizer, rows = Run("x").tokenizer(after), before.config["vocab_size"]
    cut = tokenizer("in<|tool|>the<|end tool|>", add_special_tokens=False)["input_ids"]
    assert [index - rows for index in cut if index >= rows] == [0, 1]
    assert tokenizer.decode(cut, skip_special_tokens=True) == "inthe"
    table = before.load("model.embed_tokens.weight")
    parts = Speller(TokenizerFile.of(before)).spell(b"<|tool|>")
    torch.testing.assert_close(after.load("model.embed_tokens.weight")[rows], table[list(parts)].mean(0))


def test_keys_of_other_sources_and_missing_ones_are_named(corpus):
    for values, message in [
        ({"vocabulary": "trim"}, "size is not for"),
        ({"vocabulary": "add-tokens", "size": None, "min_count": None}, "corpus is not for"),
        ({"vocabulary": "replace-train", "size": None}, "needs size"),
        ({"keep": ["x"]}, "keep is not for"),
        ({"adapt": {"join_below": 0.2}}, 'join_below is not for loss = "clm"'),
        ({"adapt": {"body": {"targets": ["lm_head"]}}}, "targets"),
    ]:
        with pytest.raises(ValidationError, match=message):
            toys.params(corpus, **values)


def test_what_cannot_be_done_is_refused(tmp_path, corpus):
    old = file_of("byte-bpe")
    with pytest.raises(UsageError, match="no room"):
        train(old, [toys.DUTCH], size=200)
    with pytest.raises(Unsupported, match="SentencePiece"):
        train(old, [toys.DUTCH], size=400, algorithm="unigram")
    with pytest.raises(Unsupported, match="WordPiece"):
        train(file_of("wordpiece"), [toys.DUTCH], size=400)
    folder = toys.save("llama", tmp_path / "base")
    options = {"size": None, "min_count": None}
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        toys.retrofit(folder, None, vocabulary="replace-donor", donor=tmp_path, **options)
    with pytest.raises(UsageError, match="such a token already"):
        toys.retrofit(folder, None, vocabulary="add-tokens", add=["<s>"], **options)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"]["beyond"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="beyond the embedding"):
        toys.retrofit(folder, corpus)
    assert open_checkpoint(folder)
