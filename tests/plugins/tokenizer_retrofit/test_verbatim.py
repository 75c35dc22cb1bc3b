"""Words are counted as the tokenizers library cuts them, whatever the flags of added tokens say."""

import itertools
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.plugins.tokenizer_retrofit.corpus import count_words
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile
from regraft.plugins.tokenizer_retrofit.verbatim import between
from tests.plugins.tokenizer_retrofit import toys

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def file_of(tokens, normalizer=None):
    """A byte-level tokenizer with added tokens: text and flags."""
    document = json.loads(toys.backend("byte-bpe").to_str())
    document["normalizer"] = normalizer
    first = max(document["model"]["vocab"].values()) + 1
    for place, (text, flags) in enumerate(tokens):
        entry = {"id": first + place, "content": text, "special": False, **dict.fromkeys(FLAGS, False), **flags}
        document["added_tokens"].append(entry)
    return TokenizerFile.parse(document, "file")


def counted(file, text):
    """Tokens of the words that are counted."""
    found = Counter()
    for word, count in count_words([text], file).items():
        for token in word:
            found[token] += count
    return found


def encoded(file, text):
    """Tokens of the text but for added ones, by the library."""
    added = {token.id for token in file.added}
    found = file.backend().encode(text, add_special_tokens=False)
    return Counter(token for index, token in zip(found.ids, found.tokens, strict=True) if index not in added)


@pytest.mark.parametrize("normalizer", [None, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "x"}])
def test_what_is_between_added_tokens_is_what_the_library_leaves(normalizer):
    flags = [dict(zip(FLAGS, values, strict=True)) for values in itertools.product([False, True], repeat=4)]
    files = [file_of([("the", one), ("The", {}), ("then all", {"single_word": True}), ("<|a|>", {"lstrip": True})],
                     normalizer) for one in flags]  # fmt: skip
    words = st.sampled_from(
        ["the", "The", "THE", "then", "all", "other", "<|a|>", " ", "  ", "\n", "\t", "_", "é", "x", "1"]
    )

    @settings(max_examples=60, deadline=None)
    @given(st.lists(words, max_size=9))
    def holds(parts):
        text = "".join(parts)
        for file in files:
            assert counted(file, text) == encoded(file, text), (text, file.added)

    holds()


def test_the_longest_of_two_is_meant_and_nothing_is_left_of_a_text_that_is_one():
    file = file_of([("ab", {}), ("abc", {}), ("x", {"lstrip": True, "rstrip": True})])
    outside = between(file, file.backend())
    assert list(outside("abcd ab x  e")) == ["d ", "e"]
    assert list(outside("abc")) == []
