"""Vocabularies that lie are refused."""

from __future__ import annotations

import pytest

from regraft.core.errors import InputError
from tests.core.gguf.vocabularies import byte_level_metadata, files_of, published, trained

BAD = {
    "unknown model": ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model", "t5"),
    "unknown split": ({"tokenizer.ggml.pre": "klingon"}, "tokenizer.ggml.pre", "klingon"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "tokenizer.ggml.tokens", "0"),
    "tokens of another type": ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens", None),
    "a token twice": (
        {"tokenizer.ggml.tokens": ["a", "b", "a"], "tokenizer.ggml.token_type": [1] * 3},
        "tokens",
        "'a' with ids 0 and 2",
    ),
    "too few kinds": ({"tokenizer.ggml.token_type": [1]}, "token_type", "1"),
    "merge of strangers": ({"tokenizer.ggml.merges": ["Q Z"]}, "merges", "'Q Z' at position 0"),
    "merge of one": ({"tokenizer.ggml.merges": ["Q"]}, "merges", "'Q' at position 0"),
    "flag of another type": ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token", "1"),
    "bos wanted, none named": ({"tokenizer.ggml.add_bos_token": True}, "add_bos_token", None),
    "template of another type": ({"tokenizer.chat_template": 5}, "chat_template", "5"),
}


@pytest.mark.parametrize("name", BAD)
def test_vocabularies_that_lie_are_refused(name):
    change, where, found = BAD[name]
    values = {**byte_level_metadata(trained(published("gpt-2")), "gpt-2"), **change}
    with pytest.raises(InputError) as caught:
        files_of(values, rows=1000)
    assert where in caught.value.where
    assert found is None or found in caught.value.found
    assert caught.value.remedy


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(InputError, match="does not fit the embedding"):
        files_of(byte_level_metadata(trained(published("gpt-2")), "gpt-2"), rows=10)
