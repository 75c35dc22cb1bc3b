"""Merging of the runtime: the same as the plainest recount, inside its boundaries, and nothing of the text is lost."""

import json
import random
from itertools import groupby, pairwise
from operator import itemgetter

import pytest

from regraft.plugins.tokenizer_retrofit.portable.cutting import Merger
from regraft.plugins.tokenizer_retrofit.portable.merging import merge_words
from regraft.plugins.tokenizer_retrofit.spell import Speller
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from tests.plugins.tokenizer_retrofit import toys

TEXTS = [
    "the verzekering dekt de verzekerde, and the makers made 12 of them",
    "de verzekerde verzekeraar: it's what they'd said  with   blanks\n\nand lines\tand tabs",
    "  De gezelligheid kent geen tijd </s> tijd tijd",
]


def merger(kind, **policy):
    old = TokenizerFile.parse(json.loads(toys.backend(kind).to_str()), kind)
    given = {"boundary": "pretoken", "min_count": 1, "max_token_bytes": None, "spelling": old.spelling,
             "unknown": old.unknown, **policy}  # fmt: skip
    return Merger(old.backend(), given), old


def recounted(sequences, most, valid):
    """The paper's loop: count all adjacent pairs, merge the most frequent valid one everywhere, begin again."""
    for _ in range(most):
        counts = {}
        for sequence in sequences:
            for pair in pairwise(sequence):
                if None not in pair and valid(*pair):
                    counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        left, right = min(counts, key=lambda pair: (-counts[pair], pair[0] + pair[1], pair))
        rewritten = []
        for sequence in sequences:
            out, place = [], 0
            while place < len(sequence):
                both = sequence[place : place + 2] == [left, right]
                out.append(left + right if both else sequence[place])
                place += 2 if both else 1
            rewritten.append(out)
        sequences = rewritten
    return sequences


def recounted_texts(cut, most, scope, valid, *, words):
    """The bytes of the tokens after merging, per text; with `words`, no pair leaves a pre-token of the text."""
    groups = [cut] if scope == "batch" else [[text] for text in cut]
    found = []
    for group in groups:
        keys = [
            (number, token.word if words else 0, -1 if token.free else token.first)
            for number, text in enumerate(group)
            for token in text
        ]
        flat = [token.data if token.free else None for text in group for token in text]
        runs = [
            (key[0], [data for _, data in run]) for key, run in groupby(zip(keys, flat, strict=True), key=itemgetter(0))
        ]
        merged = recounted([run for _, run in runs], most, valid)
        found += [
            [data for (place, _), run in zip(runs, merged, strict=True) if place == number for data in run]
            for number in range(len(group))
        ]
    return found


def bytes_of(texts):
    return [[token.data if token.free else None for token in text] for text in texts]


@pytest.mark.parametrize("most", [1, 5, 20, 1000])
@pytest.mark.parametrize("scope", ["batch", "example"])
def test_without_runs_of_blanks_merging_is_that_of_the_papers_loop_and_its_test_of_pre_tokens(most, scope):
    """It asks the pre-tokenizer about the joined string; the runtime looks where in the text the tokens stand."""
    runtime, old = merger("byte-bpe")
    backend = old.backend()
    texts = [*(" ".join(text.split()) for text in TEXTS), toys.ENGLISH[:300].replace("\n", " ").replace("  ", " ")]

    def valid(left, right):
        joined = left + right
        if any(byte in b" \n\t" for byte in joined[1:]) and joined.strip(b" \n\t"):
            return False
        return len(backend.pre_tokenizer.pre_tokenize_str(joined.decode())) == 1

    cut = runtime.cut(texts)
    assert [[token.ids[0] for token in text] for text in cut] == [backend.encode(text).ids for text in texts]
    assert bytes_of(runtime.merged(cut, most, scope)) == recounted_texts(cut, most, scope, valid, words=False)


@pytest.mark.parametrize("boundary", ["pretoken", "word"])
@pytest.mark.parametrize("kind", toys.KINDS)
def test_in_every_kind_of_vocabulary_merging_is_recounting_inside_pre_tokens(kind, boundary):
    runtime, _ = merger(kind, boundary=boundary)
    cut = runtime.cut(TEXTS)
    for most, scope in ((7, "batch"), (7, "example"), (1000, "batch")):
        wanted = recounted_texts(cut, most, scope, lambda left, right: runtime.valid(left + right), words=True)
        assert bytes_of(runtime.merged(cut, most, scope)) == wanted


def test_random_words_are_merged_as_by_recounting_whatever_is_barred():
    draw = random.Random(0)
    for _ in range(60):
        words = {tuple(draw.choice((b"a", b"b", b"c")) for _ in range(draw.randint(1, 9))): 1 for _ in range(8)}
        bad = {draw.choice((b"ab", b"aa", b"bc", b"aba"))}
        most = draw.randint(0, 12)
        became, saved = merge_words(words, most, min_count=1, valid=lambda data, bad=bad: data not in bad)
        wanted = recounted([list(word) for word in words], most, lambda x, y, bad=bad: x + y not in bad)
        assert list(became.values()) == wanted
        assert sum(saved) == sum(map(len, words)) - sum(map(len, wanted))


@pytest.mark.parametrize("boundary", ["pretoken", "word"])
@pytest.mark.parametrize("kind", toys.KINDS)
def test_merged_tokens_spell_the_text_and_stay_inside_their_boundary(kind, boundary):
    runtime, _ = merger(kind, boundary=boundary)
    texts = [*TEXTS, "Café en ideeën: 猫 “geïnteresseerd”"]
    cut = runtime.cut(texts)
    found = runtime.merged(cut, 10_000, "batch")
    assert sum(map(len, found)) < 0.8 * sum(map(len, cut))
    for text, base, merged in zip(texts, cut, found, strict=True):
        assert b"".join(token.data for token in merged) == b"".join(token.data for token in base)
        assert [index for token in merged for index in token.ids] == [token.ids[0] for token in base]
        if kind == "byte-bpe":
            assert b"".join(token.data for token in merged) == text.encode()
        for token in merged:
            if len(token.ids) > 1:
                assert len(token.data.decode(errors="replace").split()) <= 1, token
                assert b"</s>" not in token.data
                pieces = [base[token.first + place] for place in range(len(token.ids))]
                assert len({piece.word for piece in pieces}) == 1
                assert (token.start, token.end) == (pieces[0].start, pieces[-1].end)
    if boundary == "word" and kind == "byte-bpe":
        assert b"verzekerde," in b"|".join(token.data for text in found for token in text)


@pytest.mark.parametrize("kind", toys.KINDS)
def test_the_runtime_spells_bytes_as_the_rest_of_the_package_does(kind):
    runtime, old = merger(kind)
    speller = Speller(old)
    for text in (b" verzekering", b"gezelligheid", "cafés".encode(), b" the", b"ing"):
        own = speller.by_bytes.get(text)
        wanted = (own,) if own is not None else tuple(speller.spell(text))
        found = runtime.spelling.ids(text)
        assert found in (wanted, ())
        assert found or kind in ("unigram", "wordpiece")


def test_counts_and_lengths_have_their_limits():
    runtime, _ = merger("byte-bpe", min_count=3, max_token_bytes=5)
    cut = runtime.cut(TEXTS)
    found = runtime.merged(cut, 1000, "batch")
    assert max(len(token.data) for text in found for token in text if len(token.ids) > 1) <= 5
    seldom, _ = merger("byte-bpe", min_count=100)
    assert seldom.merged(cut, 1000, "batch") == cut
