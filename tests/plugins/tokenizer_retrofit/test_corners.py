"""Tokenizers and checkpoints that are made otherwise than most: each is handled, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.errors import InputError, TransformationError, Unsupported
from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.donor import replace_by_donor
from regraft.plugins.tokenizer_retrofit.extend import extend
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.train import train
from regraft.plugins.tokenizer_retrofit.trim import trim
from tests.materialise import materialise
from tests.plugins.tokenizer_retrofit import toys

SENTENCE = "The word was with them; 12 of them.\n\nIt's made:\tso."
ANY = {"size": None, "min_count": None}


def document(kind="byte-bpe"):
    return json.loads(toys.backend(kind).to_str())


def parsed(given):
    return TokenizerFile.parse(given, "file")


def ids(file, text, special=False):
    return file.backend().encode(text, add_special_tokens=special).ids


def flagged(given, content, index):
    return {**given["added_tokens"][0], "content": content, "id": index}


def above(given, *contents):
    """With added tokens behind the model's vocabulary, as Llama 3 has them."""
    first = max(given["model"]["vocab"].values()) + 1
    given["added_tokens"] += [flagged(given, text, first + place) for place, text in enumerate(contents)]
    return given


def made(old):
    """The old vocabulary through each source."""
    yield extend(old, old.rows, [toys.DUTCH], size=30, min_count=2, max_length=16)
    yield trim(old, [SENTENCE])
    yield replace_by_donor(old, old)
    if old.spelling == "bytes":
        yield train(old, [toys.DUTCH], size=400)


def edited(folder, change, name="tokenizer.json"):
    file = folder / name
    given = json.loads(file.read_text())
    change(given)
    file.write_text(json.dumps(given))
    return folder


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "nl.txt"
    path.write_text(toys.DUTCH)
    return path


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("as_text", [False, True])
def test_added_tokens_above_the_vocabulary_have_the_ids_of_the_file(ignore_merges, as_text):
    given = above(document(), "<|begin|>", "<|eot|>")
    given["model"]["ignore_merges"] = ignore_merges
    if as_text:
        given["model"]["merges"] = [" ".join(pair) for pair in given["model"]["merges"]]
    old = parsed(given)
    assert old.stray() is None
    text = f"<|begin|>{SENTENCE}<|eot|>"
    for new in made(old):
        assert new.tokenizer.backend().get_vocab(with_added_tokens=True) == dict(new.tokenizer.ids)
        merges = new.tokenizer.model["merges"]
        assert "algorithm" in new.figures or all(isinstance(entry, str) == as_text for entry in merges)
        cut = ids(new.tokenizer, text)
        assert [new.origins[index].kept for index in (cut[0], cut[-1])] == [old.ids["<|begin|>"], old.ids["<|eot|>"]]
        assert new.tokenizer.backend().decode(cut, skip_special_tokens=False) == text


def test_lines_with_added_tokens_are_cut_as_before_by_a_trimmed_vocabulary():
    old = parsed(above(document(), "the", "\n\n"))
    text = "withthemakers\n\nwas"
    new = trim(old, [text])
    assert [new.origins[index].kept for index in ids(new.tokenizer, text)] == ids(old, text)
    made_across = extend(old, old.rows, ["withthe makers " * 9], size=30, min_count=2, max_length=16)
    tokens = {made_across.tokenizer.tokens[index] for index in range(old.rows, made_across.tokenizer.rows)}
    assert tokens
    assert not any("the" in token for token in tokens)


@pytest.mark.parametrize(
    "processor",
    [
        {"type": "RobertaProcessing", "sep": ["<|in|>", 320], "cls": ["<s>", 1], "trim_offsets": True,
         "add_prefix_space": False},
        {"type": "BertProcessing", "sep": ["<|in|>", 320], "cls": ["<s>", 1]},
        {"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|in|>", "type_id": 0}},
             {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
             {"Sequence": {"id": "B", "type_id": 1}}],
             "special_tokens": {"<|in|>": {"id": "<|in|>", "ids": [320], "tokens": ["<|in|>"]}}}]},
    ],
    ids=["roberta", "bert", "nested"],
)  # fmt: skip
def test_texts_begin_and_end_with_the_same_tokens_after_ids_moved(processor):
    given = above(document(), "<|in|>")
    given["post_processor"] = processor
    old = parsed(given)
    for new in made(old):
        before = old.backend().encode("the", add_special_tokens=True).tokens
        assert new.tokenizer.backend().encode("the", add_special_tokens=True).tokens[0] == before[0]
        assert new.tokenizer.backend().encode("the", add_special_tokens=True).tokens[-1][-1] == before[-1][-1]
    assert ids(trim(old, ["the"]).tokenizer, "the", special=True) != ids(old, "the", special=True)


@pytest.mark.parametrize("normalizers", [["NFC"], ["NFC", "Lowercase"], ["NFKC"]])
def test_normalised_texts_come_back_as_before(normalizers):
    given = document()
    given["normalizer"] = {"type": "Sequence", "normalizers": [{"type": name} for name in normalizers]}
    old = parsed(given)
    for text in ["De CAFE\u0301 en Ideee\u0308n", "\ufb01jn 12", SENTENCE]:
        wanted = old.backend().decode(ids(old, text))
        for new in made(old):
            assert new.tokenizer.backend().decode(ids(new.tokenizer, text)) == wanted


def test_trimmed_unigram_pieces_with_byte_fallback_still_write_every_text():
    old = parsed(json.loads(json.dumps(train(parsed(document("unigram")), [toys.DUTCH], size=420, min_count=2,
                                             algorithm="unigram").tokenizer.document)))  # fmt: skip
    new = trim(old, ["de kosten"])
    assert new.tokenizer.rows < old.rows
    for text in ["de kosten", "猫", toys.DUTCH.splitlines()[0], "\U0001f600"]:
        assert new.tokenizer.backend().decode(ids(new.tokenizer, text)) == text
    assert [new.origins[index].kept for index in ids(new.tokenizer, "de kosten")] == ids(old, "de kosten")


def test_holes_in_the_ids_stay_where_they_are_and_close_up_when_trimmed():
    given = document()
    last = max(given["model"]["vocab"], key=given["model"]["vocab"].get)
    given["model"]["vocab"][last] += 7
    old = parsed(given)
    new = extend(old, old.rows, [toys.DUTCH], size=10, min_count=2, max_length=16)
    assert new.tokenizer.rows == old.rows + 10
    assert new.tokenizer.ids[last] == old.ids[last]
    assert new.tokenizer.stray() is None
    assert sorted(trim(old, [SENTENCE]).tokenizer.ids.values())[-1] < 320


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda given: given["model"].update(end_of_word_suffix="</w>"), Unsupported, "end_of_word_suffix"),
        (lambda given: given["model"].update(continuing_subword_prefix="@@"), Unsupported, "continuing_subword_prefix"),
        (lambda given: given["model"].update(dropout=0.1), Unsupported, "many ways"),
        (lambda given: given["model"].update(type="WordLevel"), Unsupported, "cannot be changed"),
        (lambda given: given["model"]["vocab"].update(twin=1), InputError, "two tokens have one id"),
        (lambda given: given["model"]["merges"].append(["a", "b", "c"]), InputError, "does not read"),
        (lambda given: given["model"]["merges"].append(["nothing", "there"]), InputError, "does not read"),
        (lambda given: given["added_tokens"].append(flagged(given, "<|far|>", 390)), InputError, "another id"),
    ],
)
def test_tokenizers_that_cannot_be_followed_are_refused(tmp_path, corpus, change, error, message):
    folder = edited(toys.save("llama", tmp_path / "base", rows=400), change)
    with pytest.raises(error, match=message):
        toys.retrofit(folder, corpus)


def test_a_class_that_replaces_the_stages_of_the_base_is_told(tmp_path, corpus):
    folder = toys.save("llama", tmp_path / "base")
    edited(folder, lambda given: given.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, given["pre_tokenizer"]]}))  # fmt: skip
    edited(folder, lambda given: given.update(tokenizer_class="GPT2Tokenizer"), "tokenizer_config.json")
    _, after, patch = toys.retrofit(folder, corpus)
    assert any("by its class GPT2Tokenizer" in note for note in patch.notes)
    assert Run("x").tokenizer(after).tokenize("12") == ["1", "2"]


def test_packed_embeddings_and_more_tables_are_refused(tmp_path, corpus):
    folder = toys.save("llama", tmp_path / "base", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor, message in [
        ("model.embed_tokens.weight", tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn), "floating-point"),
        ("lm_head.weight", tensors["lm_head.weight"].char(), "floating-point"),
        ("model.embed_tokens_per_layer.weight", torch.zeros(320, 8), "second table of embeddings"),
    ]:
        save_file({**tensors, name: tensor}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(Unsupported, match=message):
            toys.retrofit(folder, corpus)


def test_a_head_with_a_bias_in_another_shard_follows_the_vocabulary(tmp_path, corpus):
    from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

    folder = toys.save("llama", tmp_path / "base")
    for file in folder.glob("model*"):
        file.unlink()
    config = PhiConfig(vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                       num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder, max_shard_size="22KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["lm_head.weight"] != index["model.embed_tokens.weight"]
    before, after, patch = toys.retrofit(folder, corpus)
    assert patch.edits.keys() == {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    composed = json.loads(patch.reports["id_map.json"].read())["composed_of"]
    for name in patch.edits:
        for place, parts in composed.items():
            torch.testing.assert_close(after.load(name)[int(place)], before.load(name)[parts].mean(0))
    loaded = AutoModelForCausalLM.from_pretrained(materialise(after, tmp_path / "out"))
    cut = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(cut).logits[..., :320], model.eval()(cut).logits)


def test_an_encoder_with_the_bias_of_its_masked_head_is_extended(tmp_path, corpus):
    from transformers import BertConfig, BertForMaskedLM

    folder = toys.save("llama", tmp_path / "base", "wordpiece")
    for file in folder.glob("*model*.safetensors"):
        file.unlink()
    rows = toys.backend("wordpiece").get_vocab_size()
    model = BertForMaskedLM(BertConfig(vocab_size=rows, hidden_size=16, intermediate_size=rows, num_hidden_layers=1,
                                       num_attention_heads=2, max_position_embeddings=rows))  # fmt: skip
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(folder)
    _, after, patch = toys.retrofit(folder, corpus)
    assert patch.edits.keys() == {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"}
    loaded = BertForMaskedLM.from_pretrained(materialise(after, tmp_path / "out"))
    cut = torch.tensor([[5, 6, 7]])
    assert loaded.config.vocab_size == rows + 40
    torch.testing.assert_close(loaded(cut).logits[..., :rows], model.eval()(cut).logits)
    with pytest.raises(Unsupported, match="does not predict"):
        toys.retrofit(folder, corpus, held_out=corpus)


def test_a_chat_is_cut_as_before_by_a_trimmed_vocabulary(tmp_path):
    text = tmp_path / "en.txt"
    text.write_text("now the word")
    folder = toys.save("llama", tmp_path / "base")
    edited(folder, lambda given: above(given, "user", "assistant"))
    wide = toys.save("llama", tmp_path / "wide", rows=322)
    (wide / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    before, after, patch = toys.retrofit(wide, text, vocabulary="trim", **ANY)
    chat = [{"role": "user", "content": "the word"}, {"role": "assistant", "content": "the"}]
    moved = json.loads(patch.reports["id_map.json"].read())["old_to_new"]
    one, other = (Run("x").tokenizer(each).apply_chat_template(chat)["input_ids"] for each in (before, after))
    assert [moved[index] for index in one] == other
    assert overlay(before, patch, by="x").config["vocab_size"] < 290


def test_a_result_whose_ids_are_not_those_of_the_file_fails(tmp_path, corpus, monkeypatch):
    folder = toys.save("llama", tmp_path / "base", rows=400)
    seen = iter([None, ("x", 1, 2)])
    with monkeypatch.context() as patched:
        patched.setattr(TokenizerFile, "stray", lambda self: next(seen))
        with pytest.raises(TransformationError, match="library gives a token another id"):
            toys.retrofit(folder, corpus)
    tokenizer = type(Run("x").tokenizer(open_checkpoint(folder)))
    monkeypatch.setattr(tokenizer, "get_vocab", lambda self: {"the": 5})
    with pytest.raises(TransformationError, match="transformers gives a token another id"):
        toys.retrofit(folder, corpus)


def test_repaired_bytes_are_the_mean_of_all_rows_and_no_text_is_lost(tmp_path):
    text = tmp_path / "nl.txt"
    text.write_text(toys.DUTCH + "a\x13b \x13\x13 " * 20 + "\U00040000\n")
    folder = toys.save("llama", tmp_path / "base", rows=310)
    gone = {chr(256 + 0x13), "\u00f1", "\u0100", "\u00c1"}

    def without(given):
        kept = [token for token in given["model"]["vocab"] if token not in gone][:300]
        merges = [pair for pair in given["model"]["merges"] if {*pair, "".join(pair)} <= set(kept)]
        given["model"].update(vocab={token: index for index, token in enumerate(kept)}, merges=merges)

    edited(folder, without)
    before, after, patch = toys.retrofit(folder, text, repair_bytes=True)
    old, new = TokenizerFile.of(before), TokenizerFile.of(after)
    lost = "a\x13b \x00"
    assert old.backend().decode(ids(old, lost)) != lost
    for one in [lost, "\U00040000", toys.DUTCH, *map(chr, range(256))]:
        assert new.backend().decode(ids(new, one), skip_special_tokens=False) == one
    assert [new.tokens[index] for index in range(300, 304)] == sorted(gone, key=lambda one: new.bytes_of(one))
    assert not any(set(token) & gone for token in new.tokens.values() if len(token) > 1)
    table = before.load("model.embed_tokens.weight")
    for index in range(300, 304):
        torch.testing.assert_close(after.load("model.embed_tokens.weight")[index], table.mean(0))
    assert patch.metrics["repaired_bytes"] == patch.metrics["unspelled"] == 4
    with pytest.raises(Unsupported, match="byte-level"):
        toys.retrofit(toys.save("llama", tmp_path / "pieces", "piece-bpe"), text, repair_bytes=True)


def test_an_encoder_with_a_decoder_behind_it_is_refused_by_name(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    rows = toys.backend("unigram").get_vocab_size()
    config = T5Config(vocab_size=rows, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    toys.backend("unigram").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "corpus.txt").write_text(toys.DUTCH)
    with pytest.raises(Unsupported) as refusal:
        toys.retrofit(tmp_path, tmp_path / "corpus.txt")
    assert "t5" in str(refusal.value)
    assert refusal.value.remedy


def test_a_huge_line_is_cut_like_the_lines_it_holds(tmp_path):
    """Half a million characters without a line break give the tokens of the same text with them."""
    lines = toys.DUTCH.replace("\n\n", "\n").splitlines()
    files = []
    for name, between in (("line.txt", " "), ("lines.txt", "\n")):
        files.append(tmp_path / name)
        files[-1].write_text(between.join(lines * 400))
    folder = toys.save("llama", tmp_path / "base")
    added = []
    for file in files:
        before, after, _ = toys.retrofit(folder, file, size=30, proof="files")
        old = TokenizerFile.of(before).tokens
        added.append({text for index, text in TokenizerFile.of(after).tokens.items() if index not in old})
    assert len(added[0]) == 30
    assert len(added[0] & added[1]) >= 28


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("unigram", {}),
        ("piece-bpe", {"byte_fallback": False, "fuse_unk": True}),
        ("piece-bpe", {"byte_fallback": False, "fuse_unk": False}),
        ("wordpiece", {"max_input_chars_per_word": 6}),
    ],
)
def test_no_merge_goes_through_what_is_unknown(kind, settings):
    given = document(kind)
    given["model"].update(settings)
    old = parsed(given)
    text = "de 猫猫a 猫kosten 猫a b猫 gezelligheid "
    new = extend(old, old.rows, [text * 30], size=12, min_count=2, max_length=16)
    made_new = [new.tokenizer.tokens[index] for index in range(old.rows, new.tokenizer.rows)]
    assert made_new
    assert not any("猫" in token or "<unk>" in token for token in made_new)
    cut, before = ids(new.tokenizer, text), ids(old, text)
    assert [part for index in cut for part in (new.origins[index].parts or [index])] == before
    assert cut.count(old.ids["<unk>"]) == before.count(old.ids["<unk>"]) >= 3
    assert len(cut) < len(before)
