"""Where the texts come from: names of files, budgets, rows, pieces, and what a corpus has no use for."""

import json

import pytest
from pydantic import ValidationError

from regraft.core.data.settings import DataSettings
from regraft.core.errors import UsageError
from regraft.plugins.tokenizer_retrofit import corpus as corpora
from regraft.plugins.tokenizer_retrofit.corpus import Corpus, count_words
from regraft.plugins.tokenizer_retrofit.dynamic.params import DynamicTokenizationParams
from regraft.plugins.tokenizer_retrofit.large.params import LargeVocabularyParams
from regraft.plugins.tokenizer_retrofit.params import TokenizerRetrofitParams
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from tests.plugins.tokenizer_retrofit import toys


@pytest.fixture
def languages(tmp_path):
    """Two files of one name."""
    for name, text in (("en", toys.ENGLISH), ("nl", toys.DUTCH)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.txt").write_text(text)
    return [tmp_path / "en/train.txt", tmp_path / "nl/train.txt"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = ["zq xyzzyq"] * 20 + toys.DUTCH.splitlines()
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def corpus(source, budget=None, **values):
    return Corpus(DataSettings(source=source, **values), budget)


def test_files_of_one_name_each_have_their_figures(tmp_path, languages):
    folder = toys.save("llama", tmp_path / "base")
    _, _, patch = toys.retrofit(folder, languages, size=10)
    report = json.loads(patch.reports["retrofit_report.json"].read())
    assert list(report["corpus"]) == list(report["bpb_by_file"]) == ["en/train.txt", "nl/train.txt"]
    assert len(set(report["corpus"].values())) == 2
    assert "| en/train.txt |" in patch.reports["retrofit.md"].read().decode()
    _, _, held = toys.retrofit(folder, languages[1], size=10, held_out=[str(path) for path in languages])
    figures = json.loads(held.reports["retrofit_report.json"].read())["bpb_by_file"]
    assert set(figures) == {"en/train.txt", "nl/train.txt"}


def test_a_pattern_is_the_files_that_it_matches(tmp_path, languages):
    found = corpus(f"{tmp_path}/*/*.txt")
    assert list(found.texts()) == [toys.ENGLISH, toys.DUTCH]
    assert list(found.summary()) == ["en/train.txt", "nl/train.txt"]
    with pytest.raises(UsageError, match="no data file matches the pattern"):
        list(corpus(f"{tmp_path}/*/*.md").texts())


def test_the_first_rows_alone_are_read(rows):
    assert list(corpus(str(rows), max_rows=3).texts()) == ["zq xyzzyq"] * 3
    assert list(corpus(str(rows), budget=20, max_rows=3).texts()) == ["zq xyzzyq", "zq xyzzyq", "zq"]


def test_long_files_come_in_pieces_and_no_further_than_the_budget(tmp_path, monkeypatch):
    text, path = toys.ENGLISH * 300, tmp_path / "en.txt"
    path.write_text(text)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    monkeypatch.setattr(corpora, "_FILE_CHARACTERS", 1 << 16)
    pieces = list(corpus(str(path)).texts())
    assert len(pieces) > 1
    assert "".join(pieces) == text
    for kind in ("byte-bpe", "unigram", "wordpiece"):
        file = TokenizerFile.parse(json.loads(toys.backend(kind).to_str()), kind)
        assert count_words(pieces, file) == count_words([text], file)
    assert "".join(corpus((str(path), str(tmp_path / "bad.txt")), budget=100_000).texts()) == text[:100_000]


@pytest.mark.parametrize("loss", ["clm", "alm"])
def test_what_is_learnt_of_the_corpus_ends_with_its_budget(tmp_path, rows, loss):
    folder = toys.save("llama", tmp_path / "base")
    adapt = {"steps": None, "tokens": 32, "loss": loss}

    def learnt(source, **values):
        patch = toys.retrofit(folder, source, size=10, min_count=2, adapt=adapt, **values)[2]
        return json.loads(patch.reports["retrofit_report.json"].read())["adapt"]["data"]

    short, long = tmp_path / "short.txt", tmp_path / "long.txt"
    short.write_text(toys.DUTCH[:400])
    long.write_text(toys.DUTCH[:400] + "xq " * 200)
    count, limit = "tokens" if loss == "clm" else "chunks", len(toys.DUTCH[:400].encode())
    assert learnt(long, corpus_bytes=limit)[count] == learnt(short)[count] < learnt(long)[count]


@pytest.mark.parametrize("stray", [{"learn": "all"}, {"pack": True}, {"max_tokens": 16}, {"min_tokens": 5},
                                   {"too_long": "drop"}, {"end": False}, {"restart_positions": True}])  # fmt: skip
def test_keys_of_sequences_are_refused_where_texts_are_read(rows, stray):
    (name,) = stray
    data = {"source": str(rows), **stray}
    for kind, values in [
        (TokenizerRetrofitParams, {"corpus": data}),
        (TokenizerRetrofitParams, {"corpus": str(rows), "held_out": data}),
        (TokenizerRetrofitParams, {"corpus": str(rows), "adapt": {"loss": "alm", "data": data}}),
        (DynamicTokenizationParams, {"reduction": 0.5, "corpus": data}),
        (LargeVocabularyParams, {"size": 8, "corpus": data}),
    ]:
        with pytest.raises(ValidationError, match=f"{name} has no effect on: leave it out"):
            kind.model_validate_json(json.dumps(values), strict=True)
    packed = json.dumps({"corpus": str(rows), "adapt": {"data": data}})
    if name in ("learn", "pack", "max_tokens", "too_long"):
        with pytest.raises(ValidationError, match=f"{name} has no effect on: leave it out"):
            TokenizerRetrofitParams.model_validate_json(packed, strict=True)
    else:
        TokenizerRetrofitParams.model_validate_json(packed, strict=True)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"algorithm": "unigram"}, "algorithm"),
        ({"special": "donor"}, "special"),
        ({"atoms": 3}, "atoms"),
        ({"add_special": False}, "add_special"),
        ({"vocabulary": "replace-train", "size": 300, "max_length": 3}, "max_length"),
        ({"vocabulary": "replace-train", "size": 300, "algorithm": "unigram", "min_count": 3}, "min_count"),
        ({"vocabulary": "trim", "max_length": 3}, "max_length"),
    ],
)
def test_keys_of_other_vocabularies_are_refused(rows, values, named):
    with pytest.raises(ValidationError, match=f"{named} is (not )?for .*: leave it out"):
        TokenizerRetrofitParams.model_validate_json(json.dumps({"corpus": str(rows), **values}), strict=True)
