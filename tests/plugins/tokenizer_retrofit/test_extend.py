"""`extend`: texts keep their tokens but for joined neighbours, and the model its logits."""

import itertools
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.errors import InputError, TransformationError
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.tokenizer_retrofit.extend import extend
from regraft.plugins.tokenizer_retrofit.merges import learn_merges
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from tests.plugins.tokenizer_retrofit import toys


def file_of(kind):
    return TokenizerFile.parse(json.loads(toys.backend(kind).to_str()), kind)


@pytest.fixture(scope="module")
def extended():
    made = {}

    def of(kind):
        if kind not in made:
            old = file_of(kind)
            made[kind] = old, extend(old, old.rows, [toys.DUTCH], size=60, min_count=2, max_length=16)
        return made[kind]

    return of


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def split(new, found):
    """The tokens of a text with every new one taken apart again."""
    return [
        part
        for index in found
        for part in ([index] if new.origins[index].kept is not None else new.origins[index].parts)
    ]


WORDS = [*toys.DUTCH.split(" ")[:60], *toys.ENGLISH.split(" ")[:30], "\n", "12", "猫", "é"]


@pytest.mark.parametrize("kind", ["byte-bpe", "piece-bpe", "unigram"])
def test_taken_apart_the_new_tokens_of_any_text_are_the_old_ones(extended, kind):
    old, new = extended(kind)
    before, after = old.backend(), new.tokenizer.backend()

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(st.sampled_from([*toys.DUTCH.split(" ")[:60], *toys.ENGLISH.split(" ")[:30], "\n", "12", "猫", "é"]))
    )
    def holds(words):
        text = " ".join(words)
        cut = ids(after, text)
        assert split(new, cut) == ids(before, text)
        assert len(cut) <= len(ids(before, text))
        assert after.decode(cut) == before.decode(ids(before, text))

    holds()
    assert len(ids(after, toys.DUTCH)) < 0.7 * len(ids(before, toys.DUTCH))


def test_wordpiece_keeps_the_ids_of_texts_without_new_tokens_and_says_that_it_may_cut_others_otherwise(extended):
    old, new = extended("wordpiece")
    before, after = old.backend(), new.tokenizer.backend()
    assert any("may be cut otherwise" in note for note in new.notes)
    words = sorted({word.strip(".,;:'") for word in (toys.DUTCH + toys.ENGLISH).split()})
    texts = [one[:2] + other[1:] for one in words for other in words]
    fresh = {text for text in texts if any(new.origins[index].kept is None for index in ids(after, text))}
    assert all(ids(after, text) == ids(before, text) for text in {*texts} - fresh)
    assert any(split(new, ids(after, text)) != ids(before, text) for text in fresh)
    assert all(not any("otherwise" in note for note in extended(kind)[1].notes) for kind in ("byte-bpe", "unigram"))


LETTERS = "abc"
SHORT = [text for size in range(1, 7) for text in map("".join, itertools.product(LETTERS, repeat=size))]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(SHORT), min_size=1, max_size=12),
    st.lists(st.sampled_from(SHORT), min_size=4, max_size=30),
    st.lists(st.sampled_from([text for text in SHORT if len(text) > 1]), max_size=6, unique=True),
)
def test_words_that_are_tokens_keep_to_that_with_ignore_merges(learnt, corpus, whole):
    """`whole`: tokens that no merge makes, which only a word that they are is cut into."""
    merges = learn_merges(Counter(map(tuple, learnt)), 8)
    tokens = dict.fromkeys([*LETTERS, "Ġ", *(merge.token for merge in merges), *whole])
    document = json.loads(toys.backend("byte-bpe").to_str())
    document["added_tokens"] = []
    document["model"] |= {"vocab": {token: index for index, token in enumerate(tokens)}, "ignore_merges": True,
                          "merges": [[merge.left, merge.right] for merge in merges]}  # fmt: skip
    old = TokenizerFile.parse({**document, "post_processor": None}, "file")
    try:
        new = extend(old, old.rows, [" ".join(corpus)], size=40, min_count=1, max_length=6)
    except InputError:
        return  # nothing to merge
    before, after = old.backend(), new.tokenizer.backend()
    for text in [*SHORT, " ".join(corpus)]:
        assert split(new, ids(after, text)) == ids(before, text)


@pytest.mark.parametrize("kind", toys.KINDS)
def test_fewer_tokens_and_the_same_text_in_every_kind_of_vocabulary(extended, kind):
    old, new = extended(kind)
    before, after = old.backend(), new.tokenizer.backend()
    assert len(ids(after, toys.DUTCH)) < 0.85 * len(ids(before, toys.DUTCH))
    assert after.decode(ids(after, toys.DUTCH)) == before.decode(ids(before, toys.DUTCH))
    assert new.counts() == {"copied": old.rows, "composed": 60, "unspelled": 0}
    for token, index in old.ids.items():
        assert new.tokenizer.ids[token] == index


def test_no_new_token_crosses_a_word(extended):
    _, new = extended("byte-bpe")
    tokens = [new.tokenizer.tokens[index] for index, origin in enumerate(new.origins) if origin.kept is None]
    assert all("Ġ" not in token[1:] and "Ċ" not in token[1:] for token in tokens)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "mistral", "gpt2"])
def test_kept_rows_keep_their_bits_and_old_texts_their_logits(tmp_path, family):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save(family, tmp_path / "base")
    before, after, patch = toys.retrofit(folder, corpus, pad_to_multiple_of=64)
    rows = before.config["vocab_size"]
    assert after.config["vocab_size"] % 64 == 0
    for name in patch.edits:
        one, other = before.load(name), after.load(name)
        assert torch.equal(one, other[:rows])
        composed = json.loads(patch.reports["id_map.json"].read())["composed_of"]
        for index, parts in composed.items():
            mean = one[parts].double().mean(0)
            torch.testing.assert_close(other[int(index)].double(), mean, atol=1e-6, rtol=0)
        assert not other[rows + len(composed) :].any()
    run = Run("retrofit")
    cut = run.tokenizer(before)("In the beginning was the word", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        old, new = run.model(before)(cut).logits, run.model(after)(cut).logits
    assert torch.equal(old, new[..., :rows])


def test_a_class_that_cuts_otherwise_than_the_file_is_refused(tmp_path):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save("qwen2", tmp_path / "base", own_class=False)
    with pytest.raises(TransformationError, match="cuts a text otherwise"):
        toys.retrofit(folder, corpus)


def test_padding_rows_that_no_token_uses_are_used_first(tmp_path):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save("llama", tmp_path / "base", rows=400)
    before, after, _ = toys.retrofit(folder, corpus, size=30)
    assert before.config["vocab_size"] == after.config["vocab_size"] == 400


def test_the_same_corpus_gives_the_same_bytes(tmp_path):
    corpus = tmp_path / "nl.txt"
    corpus.write_text(toys.DUTCH)
    folder = toys.save("llama", tmp_path / "base")
    one, other = (toys.retrofit(folder, corpus)[2] for _ in range(2))
    assert one.reports.keys() == {"id_map.json", "retrofit_report.json", "retrofit.md", "fertility.png"}
    assert one.files["tokenizer.json"].read() == other.files["tokenizer.json"].read()
    assert {name: file.read() for name, file in one.reports.items()} == {
        name: file.read() for name, file in other.reports.items()
    }


def test_bad_corpora_are_refused(tmp_path):
    folder = toys.save("llama", tmp_path / "base")
    for name, data, message in [
        ("empty.txt", b"", "no text"),
        ("binary.txt", b"\x7fELF\0\0 some text", "zero byte"),
        ("latin.txt", "café".encode("latin-1"), "not UTF-8"),
        ("rare.txt", b"xq", "nothing to merge"),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            toys.retrofit(folder, path)


def test_a_checkpoint_without_tokenizer_json_is_refused(tmp_path):
    from regraft.core.errors import Unsupported

    folder = toys.save("llama", tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (tmp_path / "nl.txt").write_text(toys.DUTCH)
    with pytest.raises(Unsupported, match="no fast form"):
        toys.retrofit(folder, tmp_path / "nl.txt")
    assert open_checkpoint(folder)
