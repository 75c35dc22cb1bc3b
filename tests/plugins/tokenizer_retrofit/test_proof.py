"""What a step proves of its own work, what it rewrites beside the tensors, and what it refuses to begin."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.errors import InputError, TransformationError
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.donor import replace_by_donor
from regraft.plugins.tokenizer_retrofit.metadata import metadata
from regraft.plugins.tokenizer_retrofit.rows import Rows
from regraft.plugins.tokenizer_retrofit.spell import Speller
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.train import train
from regraft.plugins.tokenizer_retrofit.trim import trim
from tests.families import CONFIGS, save_tiny
from tests.materialise import materialise
from tests.plugins.tokenizer_retrofit import toys
from tests.running import regraft

PLAIN = {"size": None, "min_count": None}


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "nl.txt"
    path.write_text(toys.DUTCH)
    return path


def file_of(kind):
    return TokenizerFile.parse(json.loads(toys.backend(kind).to_str()), kind)


def ids(file, text):
    return file.backend().encode(text, add_special_tokens=False).ids


def write(folder, name, document):
    (folder / name).write_text(json.dumps(document))


def test_every_key_that_names_a_token_follows_it_and_stale_files_stay_behind(tmp_path):
    folder = toys.save("llama", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", {**config, "image_token_index": 7, "sep_token_id": 9, "unk_token_id": None,
          "decoder_start_token_id": 5, "text_config": {"vocab_size": 320, "eos_token_id": [2, 9]}})  # fmt: skip
    write(folder, "generation_config.json", {"eos_token_id": [2, 9], "forced_bos_token_id": 7,
          "begin_suppress_tokens": [5, -1], "bad_words_ids": [[7, 9], [5]], "forced_decoder_ids": [[1, 9]],
          "max_length": 9})  # fmt: skip
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    decoder = {"0": {"content": "<pad>"}, "9": {"content": "x"}, "8": {"content": "gone"}}
    write(folder, "tokenizer_config.json", {**settings, "sp_model_kwargs": {}, "legacy": True,
          "tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder})  # fmt: skip
    stale = ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "spiece.model", "tiktoken.model")
    for name in stale:
        write(folder, name, {})
    moved = {0: 0, 1: 1, 2: 2, 5: 3, 7: 4, 9: 5}
    changes = metadata(open_checkpoint(folder), 64, moved, padding=2)
    assert changes.dropped.keys() == set(stale)
    assert changes.json["config.json"] == {
        "vocab_size": 64, "image_token_index": 4, "sep_token_id": 5, "decoder_start_token_id": 3,
        "text_config": {"vocab_size": 64, "eos_token_id": [2, 5]},
    }  # fmt: skip
    assert changes.json["generation_config.json"] == {
        "eos_token_id": [2, 5], "forced_bos_token_id": 4, "begin_suppress_tokens": [3, -1],
        "bad_words_ids": [[4, 5], [3]], "forced_decoder_ids": [[1, 5]], "suppress_tokens": [62, 63],
    }  # fmt: skip
    changed = changes.json["tokenizer_config.json"]
    assert changed["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert changed["added_tokens_decoder"] == {"5": {"content": "x"}, "9": None, "8": None}
    assert {key for key, value in changed.items() if value is None} == {"sp_model_kwargs", "legacy"}
    with pytest.raises(TransformationError, match="names a token that the new vocabulary lacks"):
        metadata(open_checkpoint(folder), 64, {index: index for index in (0, 1, 2, 5, 7)})


def test_a_vocabulary_of_all_that_there_was_changes_no_bit(tmp_path, corpus):
    for kind in toys.KINDS:
        old = file_of(kind)
        new = trim(old, ["the"], keep_ids=old.tokens)
        assert new.tokenizer.ids == old.ids
        assert [origin.kept for origin in new.origins] == list(range(old.rows))
        assert ids(new.tokenizer, toys.DUTCH) == ids(old, toys.DUTCH)
    folder = toys.save("llama", tmp_path / "base")
    options = {"vocabulary": "replace-donor", "donor": folder, **PLAIN, "held_out": corpus}
    before, after, patch = toys.retrofit(folder, None, **options)
    assert patch.metrics["bpb_before"] == patch.metrics["bpb_initial"]
    assert all(torch.equal(before.load(name), after.load(name)) for name in before.specs)


def test_a_tied_head_stays_tied_where_it_is_stored_too(tmp_path, corpus):
    from transformers import AutoModelForCausalLM

    folder = toys.save("llama", tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file({**tensors, "lm_head.weight": tensors[name].clone()}, folder / "model.safetensors", {"format": "pt"})
    _, after, _ = toys.retrofit(folder, corpus)
    loaded = AutoModelForCausalLM.from_pretrained(materialise(after, tmp_path / "out"))
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in after.specs or torch.equal(after.load("lm_head.weight"), after.load(name))


def test_a_kept_row_that_is_no_copy_fails_the_step(tmp_path, corpus, monkeypatch):
    folder = toys.save("llama", tmp_path / "base")
    monkeypatch.setattr("regraft.plugins.tokenizer_retrofit.initial.subtoken_means",
                        lambda table, origins: Rows([[0]] * len(origins)))  # fmt: skip
    with pytest.raises(TransformationError, match="row of a kept token is no copy"):
        toys.retrofit(folder, corpus)


def test_a_chat_that_is_rendered_otherwise_fails_the_step(tmp_path, corpus, monkeypatch):
    folder = toys.save("llama", tmp_path / "base")
    kind, seen = type(Run("x").tokenizer(open_checkpoint(folder))), []

    def rendered(self, chat, **options):
        seen.append(chat)
        return f"chat {len(seen)}"

    monkeypatch.setattr(kind, "apply_chat_template", rendered)
    with pytest.raises(TransformationError, match="a chat is rendered otherwise"):
        toys.retrofit(folder, corpus)


def test_tables_say_what_the_figures_say(tmp_path, corpus):
    english = tmp_path / "en.txt"
    english.write_text(toys.ENGLISH)
    folder = toys.save("llama", tmp_path / "base")
    adapt = {"steps": 2, "tokens": 32, "precision": "float32", "lr": 1e-4}
    _, _, patch = toys.retrofit(folder, corpus, held_out=[corpus, english], adapt=adapt)
    page = patch.reports["retrofit.md"].read().decode()
    figures = json.loads(patch.reports["retrofit_report.json"].read())
    rows = {line.split(" | ")[0].strip("| "): line for line in page.splitlines() if line.startswith("| ")}
    by_file = figures["bpb_by_file"]
    assert by_file.keys() == {"nl.txt", "en.txt"}
    states = ("before", "initial", "adapted")
    wanted = " | ".join(f"{by_file['en.txt'][state]:.3f}" for state in states)
    assert rows["en.txt"] == f"| en.txt | {wanted} |"
    together = " | ".join(f"{figures[f'bpb_{state}']:.3f}" for state in states)
    assert rows["all of 2 files"] == f"| all of 2 files | {together} |"
    sizes = {name: len(text.encode()) for name, text in (("nl.txt", toys.DUTCH), ("en.txt", toys.ENGLISH))}
    pooled = sum(by_file[name]["before"] * size for name, size in sizes.items()) / sum(sizes.values())
    assert figures["bpb_before"] == pytest.approx(pooled, abs=1e-5)
    assert "| file | before | after | after / before |" in page
    assert str(tmp_path) not in page + json.dumps(figures)


def test_training_a_vocabulary_twice_gives_the_same_bytes():
    for kind, algorithm in (("byte-bpe", "bpe"), ("piece-bpe", "unigram"), ("byte-bpe", "longest-match")):
        one, other = (train(file_of(kind), [toys.DUTCH], size=420, algorithm=algorithm, min_count=2) for _ in range(2))
        assert json.dumps(one.tokenizer.document) == json.dumps(other.tokenizer.document)


@pytest.mark.parametrize("algorithm", ["bpe", "longest-match"])
def test_characters_of_every_plane_and_long_words_come_back(algorithm):
    new = train(file_of("byte-bpe"), [toys.DUTCH], size=420, algorithm=algorithm, min_count=2).tokenizer
    texts = [chr((plane << 16) + offset) for plane in range(17) for offset in (0x41, 0x3042, 0x9FFF, 0xF000, 0xFFFD)]
    for text in [*map(chr, range(256)), *texts, "a" * 500, "e\u0301 é", "\r\n\r", "<s>", "</s> <pad>"]:
        assert new.backend().decode(ids(new, text), skip_special_tokens=False) == text


def test_a_real_piece_wins_over_the_byte_piece_of_the_same_byte():
    old = file_of("piece-bpe")
    assert {"<0x61>", "a"} <= old.vocab.keys()
    assert Speller(old).by_bytes[b"a"] == old.vocab["a"]
    assert Speller(old).by_bytes[b"\xe7"] == old.vocab["<0xE7>"]


@pytest.mark.parametrize("scheme", ["first", "never", "always"])
def test_pieces_of_every_prefix_scheme_are_extended(scheme):
    from regraft.plugins.tokenizer_retrofit.extend import extend

    document = json.loads(toys.backend("unigram").to_str())
    document["pre_tokenizer"]["prepend_scheme"] = document["decoder"]["prepend_scheme"] = scheme
    old = TokenizerFile.parse(document, "file")
    new = extend(old, old.rows, [toys.DUTCH], size=40, min_count=2, max_length=16).tokenizer
    assert len(ids(new, toys.DUTCH)) < len(ids(old, toys.DUTCH))
    for text in ["De kosten", " De kosten", "zei  de lezer", toys.DUTCH.splitlines()[0]]:
        assert new.backend().decode(ids(new, text)) == old.backend().decode(ids(old, text))


def test_a_donor_that_cuts_numbers_otherwise_is_told():
    old, document = file_of("byte-bpe"), json.loads(toys.backend("byte-bpe-dutch").to_str())
    assert replace_by_donor(old, TokenizerFile.parse(document, "donor")).notes == ()
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, document["pre_tokenizer"]]}  # fmt: skip
    (note,) = replace_by_donor(old, TokenizerFile.parse(document, "donor")).notes
    assert "1234567 and now 1-2-3-4-5-6-7" in note


def test_a_donor_with_ids_beyond_its_rows_is_refused(tmp_path):
    base, donor = toys.save("llama", tmp_path / "base"), toys.save("llama", tmp_path / "donor", "byte-bpe-dutch")
    name = "model.embed_tokens.weight"
    tensors = load_file(donor / "model.safetensors")
    config = json.loads((donor / "config.json").read_text())
    short = {key: tensor[:300] if len(tensor) == 320 else tensor for key, tensor in tensors.items()}
    assert len(short[name]) == 300
    short = {key: tensor.contiguous() for key, tensor in short.items()}
    save_file(short, donor / "model.safetensors", {"format": "pt"})
    write(donor, "config.json", {**config, "vocab_size": 300})
    with pytest.raises(InputError, match="ids beyond the embedding's rows"):
        toys.retrofit(base, None, vocabulary="replace-donor", donor=donor, init="omp", **PLAIN)


def test_two_added_tokens_of_one_text_are_one(tmp_path, corpus):
    folder = toys.save("llama", tmp_path / "base")
    document = json.loads((folder / "tokenizer.json").read_text())
    twin = {**document["added_tokens"][1], "id": 310}
    write(folder, "tokenizer.json", {**document, "added_tokens": [*document["added_tokens"], twin]})
    before, after, _ = toys.retrofit(folder, corpus)
    file = TokenizerFile.of(after)
    assert ids(file, "<s>x") == ids(TokenizerFile.of(before), "<s>x") == [1, file.ids["x"]]
    assert file.tokens[310] == TokenizerFile.of(before).tokens[310] != "<s>"


def test_bad_input_ends_with_a_sentence_and_writes_nothing(tmp_path, corpus):
    folder = toys.save("llama", tmp_path / "base")
    (tmp_path / "empty.txt").write_text("")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write(adapter, "adapter_config.json", {"peft_type": "LORA", "modules_to_save": ["embed_tokens"], "r": 4})
    save_file({"base_model.model.lm_head.weight": torch.zeros(320, 64)}, adapter / "adapter_model.safetensors")
    shutil.copy(folder / "tokenizer.json", adapter)
    for base, step, message in [
        (folder, 'corpus = "empty.txt"', "no text"),
        (folder, 'vocabulary = "replace-train"\ncorpus = "nl.txt"\nsize = 100', "no room"),
        (adapter, 'corpus = "nl.txt"', "adapter"),
    ]:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(f'[base]\nmodel = "{base}"\n[[steps]]\nuse = "tokenizer-retrofit"\n{step}\n')
        ran = regraft("apply", recipe, "-o", tmp_path / "out")
        assert ran.code != 0
        assert message in ran.err
        assert "Traceback" not in ran.err
        assert not (tmp_path / "out").exists()


def test_a_model_of_images_and_text_has_the_size_of_its_text_config_changed(tmp_path, corpus):
    folder = toys.save("llama", tmp_path / "base")
    save_tiny("gemma3", tmp_path / "model", text_config={**CONFIGS["gemma3"]["text_config"], "vocab_size": 320})
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tmp_path / "model" / name, folder)
    _, after, patch = toys.retrofit(folder, corpus)
    (name,) = patch.edits
    assert after.config["text_config"]["vocab_size"] == after.specs[name].rows == 360
