"""SentencePiece tokenizers rebuilt from GGUF metadata, against the algorithm's definition."""

from __future__ import annotations

import itertools
import json

import pytest
from tokenizers import Tokenizer

from regraft.core.errors import InputError
from regraft.core.sources import open_checkpoint
from tests.core.gguf.vocabularies import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, files_of, random_texts, rebuilt
from tests.core.gguf.writing import metadata, write_model
from tests.families import tiny


def sentencepiece_metadata(pieces, **more):
    """A SentencePiece vocabulary: specials, the 256 bytes, then pieces with falling scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return metadata(
        tokenizer__ggml__model="llama",
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=kinds,
        tokenizer__ggml__scores=scores,
        **more,
    )


def merged_by_score(text, ids, scores):
    """SentencePiece's BPE by its definition: merge the best-scored pair, the leftmost of equals, until none is left."""
    symbols = list(text)
    while True:
        pairs = [
            (scores[left + right], -at, at)
            for at, (left, right) in enumerate(itertools.pairwise(symbols))
            if left + right in ids
        ]
        if not pairs:
            break
        at = max(pairs)[2]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [
        id_
        for symbol in symbols
        for id_ in ([ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()])
    ]


PIECES = [
    "▁t",
    "he",
    "▁a",
    "in",
    "▁the",
    "er",
    "on",
    "▁s",
    "re",
    "an",
    "▁in",
    "ing",
    "at",
    "▁th",
    "en",
    "▁and",
    "nd",
    "▁an",
    "▁",
    "e",
    "t",
    "a",
    "o",
    "n",
    "i",
    "h",
    "s",
    "r",
    "d",
    "g",
    ".",
]
SPM_IDS = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizer_merges_by_score(prefix):
    values = sentencepiece_metadata(PIECES, tokenizer__ggml__add_space_prefix=prefix)
    ours = rebuilt(values, **SPM_IDS)
    ids = {piece: 259 + rank for rank, piece in enumerate(PIECES)}
    scores = {piece: -rank for rank, piece in enumerate(PIECES)}
    for text in ["the rain", "a", "  the", "the  end.", "thén 猫", *random_texts(400, "the andir sg.  zé")]:
        marked = ("▁" if prefix else "") + text.replace(" ", "▁")
        assert ours.encode(text).ids == [1, *merged_by_score(marked, ids, scores)], text
        assert ours.decode(ours.encode(text).ids) == text


def test_control_tokens_are_not_built_by_merges():
    pieces = ["<", "s", ">", "<s", "▁"]
    values = sentencepiece_metadata(pieces)
    document = json.loads(files_of(values, **SPM_IDS)[0]["tokenizer.json"].read())
    assert document["model"]["merges"] == [["<", "s"]]


def test_gemma_merges_in_order_of_the_vocabulary_and_spells_runs_of_spaces():
    pieces = ["  ", "    ", "▁", "a", "b", "ab", "▁a"]
    values = dict(sentencepiece_metadata(pieces, tokenizer__ggml__add_space_prefix=False))
    values["tokenizer.ggml.token_type"] = values["tokenizer.ggml.token_type"][:259] + [USER_DEFINED] * 2 + [NORMAL] * 5
    values["tokenizer.ggml.scores"] = [0.0] * 259 + [-1000.0] * 2 + [-1.0] * 5
    ours = rebuilt(values, in_order=True, **SPM_IDS)
    assert ours.encode("a     ab").tokens[1:] == ["a", "▁▁▁▁", "▁", "ab"]
    assert ours.encode(" a  b").tokens[1:] == ["▁a", "▁▁", "b"]
    assert ours.decode(ours.encode("a     ab").ids) == "a     ab"


def test_merges_of_the_file_win_over_scores():
    values = sentencepiece_metadata(["a", "b", "c", "ab", "bc"], tokenizer__ggml__add_space_prefix=False)
    assert rebuilt(values, **SPM_IDS).encode("abc").tokens[1:] == ["ab", "c"]
    listed = {**values, "tokenizer.ggml.merges": ["b c", "a b"]}
    assert rebuilt(listed, **SPM_IDS).encode("abc").tokens[1:] == ["a", "bc"]


def test_phi3_tokens_swallow_the_space_behind_them():
    values = dict(sentencepiece_metadata([*PIECES, "\n"]))
    values["general.architecture"] = "phi3"
    values["phi3.context_length"] = 128
    document = json.loads(files_of(values, **SPM_IDS)[0]["tokenizer.json"].read())
    assert {token["content"]: token["rstrip"] for token in document["added_tokens"]} == {
        "<unk>": False,
        "<s>": False,
        "</s>": True,
    }


def test_sentencepiece_needs_its_scores():
    values = {key: value for key, value in sentencepiece_metadata(PIECES).items() if key != "tokenizer.ggml.scores"}
    with pytest.raises(InputError, match="lacks a key"):
        files_of(values, **SPM_IDS)


def test_checkpoint_carries_the_tokenizer(tmp_path):
    def change(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", "▁", "a", "b", "ab"])
        writer.add_token_scores([0.0, 0.0, 0.0, -3.0, -1.0, -2.0, -1.5])
        writer.add_token_types([UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL, NORMAL, NORMAL])
        writer.add_chat_template("{{ messages }}")

    checkpoint = open_checkpoint(write_model(tmp_path / "model.gguf", tiny("llama"), change=change))
    assert set(checkpoint.files) == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert checkpoint.config["bos_token_id"] == 1
    assert checkpoint.config["pad_token_id"] is None
    assert checkpoint.json("tokenizer_config.json")["unk_token"] == "<unk>"
    tokenizer = Tokenizer.from_str(checkpoint.files["tokenizer.json"].read().decode())
    assert tokenizer.encode("ab").tokens == ["<s>", "▁", "ab"]
