"""Ids in configs that bar, bias or force tokens, and padding on the way through one step after another."""

import json

import pytest

from regraft.core.errors import TransformationError
from regraft.core.sources.open import open_checkpoint
from regraft.plugins.tokenizer_retrofit.metadata import metadata, token_ids_of
from tests.materialise import materialise
from tests.plugins.tokenizer_retrofit import toys

GENERATION = "generation_config.json"
PLAIN = {"size": None, "min_count": None, "proof": "files"}


def saying(folder, **values):
    """A checkpoint whose generation_config.json says this."""
    toys.save("llama", folder)
    (folder / GENERATION).write_text(json.dumps(values))
    return open_checkpoint(folder)


def test_ids_move_and_the_positions_and_biases_beside_them_do_not(tmp_path):
    checkpoint = saying(
        tmp_path,
        forced_decoder_ids=[[1, 2], [7, 9], [9, None]],
        sequence_bias=[[[5, 9], 7], [[7], -5.0]],
        nested={"sequence_bias": {"(7,)": 9.0, "(5, 9)": 7, "(0,)": 1.0}},
    )
    assert token_ids_of(checkpoint.generation_config) == {0, 2, 5, 7, 9}
    moved = metadata(checkpoint, 64, {0: 0, 1: 1, 2: 3, 5: 7, 7: 5, 9: 11}).json[GENERATION]
    assert moved == {
        "forced_decoder_ids": [[1, 3], [7, 11], [9, None]],
        "sequence_bias": [[[7, 11], 7], [[5], -5.0]],
        "nested": {"sequence_bias": {"(7,)": None, "(5,)": 9.0, "(5, 9)": None, "(7, 11)": 7, "(0,)": 1.0}},
    }
    with pytest.raises(TransformationError, match=r"sequence_bias.*lacks"):
        metadata(checkpoint, 64, {0: 0, 1: 1, 2: 3, 5: 7, 9: 11})


def test_what_is_barred_and_gone_needs_no_entry_and_empty_lists_go(tmp_path):
    checkpoint = saying(
        tmp_path, suppress_tokens=[7, 9], begin_suppress_tokens=[5, 7], bad_words_ids=[[5, 7], [9], [5]], max_length=9
    )
    kept = {0: 0, 1: 1, 2: 2, 5: 3}
    assert metadata(checkpoint, 64, kept).json[GENERATION] == {
        "suppress_tokens": None, "begin_suppress_tokens": [3], "bad_words_ids": [[3]],
    }  # fmt: skip
    assert metadata(checkpoint, 64, kept, padding=2).json[GENERATION]["suppress_tokens"] == [62, 63]
    del kept[2]
    with pytest.raises(TransformationError, match=r"eos_token_id.*lacks"):
        metadata(checkpoint, 64, kept)


@pytest.mark.parametrize(
    ("values", "barred"),
    [
        ({"size": 12, "min_count": 2}, range(342, 384)),
        ({"vocabulary": "add-tokens", "add": ["<|tool|>"]}, range(331, 384)),
        ({"vocabulary": "trim"}, ()),
        ({"vocabulary": "replace-train", "size": 300}, ()),
        ({"vocabulary": "replace-train", "size": 300, "pad_to_multiple_of": 64}, range(300, 320)),
    ],
    ids=["extend", "add-tokens", "trim", "replace-train", "replace-train-padded"],
)
def test_a_padded_result_is_the_base_of_any_further_step(padded, values, barred):
    folder, corpus = padded
    corpus = None if "add" in values else corpus
    before, after, patch = toys.retrofit(folder, corpus, **{**PLAIN, **values})
    assert before.generation_config["suppress_tokens"] == [*range(330, 384)]
    assert after.generation_config.get("suppress_tokens", []) == [*barred]
    assert len(json.loads(patch.reports["id_map.json"].read())["old_to_new"]) == 384


@pytest.fixture(scope="module")
def padded(folder):
    """A base of 330 tokens in 384 rows that a step made, and a corpus for the next."""
    toys.save("llama", folder / "base")
    options = {"size": 10, "proof": "files", "pad_to_multiple_of": 64}
    _, after, _ = toys.retrofit(folder / "base", folder / "corpus.txt", **options)
    (folder / "en.txt").write_text(toys.ENGLISH + "then the makers of words made words then\n" * 9)
    return materialise(after, folder / "padded"), folder / "en.txt"


def test_the_map_of_ids_has_every_old_row(tmp_path):
    text = tmp_path / "tiny.txt"
    text.write_text("aaa bbb")
    before, _, patch = toys.retrofit(toys.save("llama", tmp_path / "base"), text, vocabulary="trim", **PLAIN)
    moved = json.loads(patch.reports["id_map.json"].read())["old_to_new"]
    assert len(moved) == before.config["vocab_size"] == 320
    assert moved[-1] is None


@pytest.mark.parametrize(
    "values", [{"vocabulary": "trim"}, {"vocabulary": "extend", "size": 5}], ids=["trim", "extend"]
)
def test_what_a_file_says_of_padding_and_truncation_follows_the_ids_and_touches_no_figure(tmp_path, folder, values):
    """transformers decides both for each call, so what the file says of them counts for no text that is measured."""
    corpus, figures = folder / "corpus.txt", []
    for name, padded in (("plain", False), ("padded", True)):
        base = toys.save("llama", tmp_path / name, rows=330)
        document = json.loads((base / "tokenizer.json").read_text())
        document["added_tokens"].append({**document["added_tokens"][0], "id": 320, "content": "<blank>"})
        if padded:
            padding = {"pad_id": 320, "pad_token": "<blank>", "pad_type_id": 0, "pad_to_multiple_of": None}
            document["padding"] = {"strategy": "BatchLongest", "direction": "Right", **padding}
            document["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
        (base / "tokenizer.json").write_text(json.dumps(document))
        _, after, patch = toys.retrofit(base, corpus, **{**PLAIN, **values})
        figures.append(patch.metrics)
    result = after.json("tokenizer.json")
    assert figures[0] == figures[1]
    assert result["truncation"]["max_length"] == 9
    assert result["padding"]["pad_id"] == result["model"]["vocab"]["<blank>"]


def test_an_id_that_a_config_names_beyond_the_rows_and_a_new_token_gets_is_told(tmp_path, folder):
    base = toys.save("llama", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"pad_token_id": 321, "eos_token_id": 2}))
    _, after, patch = toys.retrofit(base, folder / "corpus.txt", size=5, proof="files")
    token = next(token for token, index in after.json("tokenizer.json")["model"]["vocab"].items() if index == 321)
    assert any(f"beyond its 320 rows, which new tokens have got: 321 is {token!r} now" in note for note in patch.notes)
