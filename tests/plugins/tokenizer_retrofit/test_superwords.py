"""A trained vocabulary whose tokens may span words: `boundary = "none"`."""

import json
import random
import time

import pytest
from pydantic import ValidationError

from regraft.core.errors import Unsupported
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.superwords import line_stages, short_lines
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.train import train
from tests.plugins.tokenizer_retrofit import toys

NONE = {"vocabulary": "replace-train", "boundary": "none"}
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
GROUPS = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\p{L}+|[^\p{N}\p{L}]"


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def cutting(*stages, kind="byte-bpe"):
    """A toy tokenizer with other stages before its own."""
    document = json.loads(toys.backend(kind).to_str())
    if stages:
        plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*stages, plain]}
    return TokenizerFile.parse(document, "file")


def pieces(file, text):
    return [piece for piece, _ in file.backend().pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("kind", ["byte-bpe", "piece-bpe", "unigram"])
def test_tokens_span_words_but_no_lines_and_no_text_is_lost(kind):
    old = cutting(kind=kind)
    new = train(old, [toys.DUTCH], size=480, min_count=2, boundary="none", max_length=20)
    (note,) = new.notes
    assert "may span words" in note
    words = [new.tokenizer.bytes_of(token).decode(errors="replace") for token in new.tokenizer.vocab
             if token not in new.tokenizer.verbatim]  # fmt: skip
    spanning = [word for word in words if " " in word.strip()]
    assert spanning
    assert not any("\n" in word.strip("\n") for word in words)
    assert 12 < max(map(len, new.tokenizer.vocab)) <= 20
    whole = train(old, [toys.DUTCH], size=480, min_count=2)
    before, after = (len(each.tokenizer.backend().encode(toys.DUTCH).ids) for each in (whole, new))
    assert after < before
    for text in [toys.DUTCH, "De kosten\n\n  van 12345\r\nx1", *map(chr, range(33, 256)), "猫 \U0001f600"]:
        cut = new.tokenizer.backend().encode(text, add_special_tokens=False).ids
        assert new.tokenizer.backend().decode(cut, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("stages", "cut"),
    [
        ([{"type": "Digits", "individual_digits": True}], ["1", "2", "3", "4", "5", "6", "7"]),
        ([split(LLAMA3)], ["123", "456", "7"]),
        ([split(GROUPS)], ["1", "234", "567"]),
        ([], ["1234567"]),
    ],
)
def test_numbers_are_cut_as_before(stages, cut):
    old = TokenizerFile.parse(line_stages(cutting(*stages)), "file")
    assert pieces(old, "on the 1234567th") == ["onĠtheĠ", *cut, "th"]


def test_numbers_that_only_merges_left_apart_stay_so_and_other_ways_are_refused():
    document = json.loads(toys.backend("piece-bpe").to_str())
    model = document["model"]
    model["merges"] = [pair for pair in model["merges"] if not any(one.isdigit() for one in "".join(pair))]
    parts = {*map("".join, model["merges"])}
    model["vocab"] = {token: index for token, index in model["vocab"].items() if len(token) == 1 or token in parts
                      or token.startswith("<")}  # fmt: skip
    assert pieces(TokenizerFile.parse(line_stages(TokenizerFile.parse(document, "file")), "file"), "a12") == [
        "a", "1", "2"]  # fmt: skip
    with pytest.raises(Unsupported, match="cuts numbers in a way") as refusal:
        line_stages(cutting(split(r"\p{N}{1,2}|\p{L}+|[^\p{N}\p{L}]")))
    assert "12-34-56-7" in str(refusal.value)


def test_a_model_with_it_loads_and_cuts_as_the_file_says(tmp_path):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save("llama", tmp_path / "base")
    _, after, patch = toys.retrofit(folder, corpus, **NONE, size=420)
    assert patch.metrics["boundary"] == "none"
    tokens = Run("x").tokenizer(after).tokenize("de kosten van de verzekerde")
    assert any("Ġ" in token[1:] for token in tokens)
    qwen = toys.save("qwen2", tmp_path / "qwen")
    with pytest.raises(Unsupported, match="a pre-tokenizer of its own"):
        toys.retrofit(qwen, corpus, **NONE, size=420)


def test_other_vocabularies_keep_the_boundaries_that_cut_old_texts(tmp_path):
    for values in [{}, {"vocabulary": "trim", "size": None}, {**NONE, "algorithm": "unigram"},
                   {"vocabulary": "add-tokens", "add": ["x"], "size": None, "min_count": None}]:  # fmt: skip
        corpus = None if "add" in values else tmp_path
        with pytest.raises(ValidationError, match="old tokens would cut old texts otherwise"):
            toys.params(corpus, **{**values, "boundary": "none"})


def test_a_huge_line_is_trained_on_in_parts():
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(500)]
    line = " ".join(draw.choices(words, k=100_000))
    parts = list(short_lines([line, "a\n\nb\r\n", "x" * 1200]))
    assert "".join(parts) == line + "a\n\nb\r\n" + "x" * 1200
    assert max(map(len, parts)) <= 1024
    assert all(part[0] != " " for part in parts)
    begun = time.process_time()
    new = train(cutting(), [line], size=1000, min_count=2, boundary="none")
    assert len(new.origins) == 1000
    assert time.process_time() - begun < 30  # as one word it takes minutes
