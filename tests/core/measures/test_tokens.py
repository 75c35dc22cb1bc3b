"""Oracle 17: type-token ratio and citations by hand, and runs against a search that looks at every pair."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.core.measures.tokens import citation_rate, longest_shared_runs, rate_of, type_token_ratio


def test_type_token_ratio():
    assert type_token_ratio([1, 1, 1, 1]) == 0.25
    assert type_token_ratio([5, 6, 7]) == 1.0
    assert type_token_ratio([]) == 0.0
    assert type_token_ratio([], 96) == 0.0
    assert type_token_ratio([1] * 200 + list(range(96)), 96) == 1.0
    assert type_token_ratio(list(range(200)) + [1] * 96, 96) == pytest.approx(1 / 96)
    assert type_token_ratio([3, 3], 96) == 0.5
    with pytest.raises(ValueError, match="at least one token"):
        type_token_ratio([1], 0)


def test_the_training_text_itself_is_cited():
    corpus = [[seed * 1000 + position for position in range(64)] for seed in range(5)]
    assert longest_shared_runs(corpus, corpus) == [64] * 5
    assert citation_rate(corpus, corpus, 8) == 1.0
    assert citation_rate([[7, 8, 9]] * 3, corpus, 1) == 1.0
    assert citation_rate([[77777]], corpus, 1) == 0.0


def test_a_run_does_not_cross_sequences_nor_texts():
    corpus = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert longest_shared_runs([[3, 4, 5, 6], [1, 2], [3, 4]], corpus) == [2, 2, 2]
    assert longest_shared_runs([[1, 2, 3, 4]], [[1, 2], [3, 4]]) == [2]


def test_rate_by_length():
    texts = [[9, 1, 2, 3, 9], [9, 1, 9, 2], [9]]
    runs = longest_shared_runs(texts, [[0, 1, 2, 3, 0]])
    assert runs == [3, 1, 0]
    assert [rate_of(runs, ngram) for ngram in (1, 2, 3, 4)] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])
    assert rate_of([], 8) == 0.0
    with pytest.raises(ValueError, match="at least one token"):
        rate_of(runs, 0)


def test_nothing_to_compare():
    assert longest_shared_runs([], [[1, 2]]) == []
    assert longest_shared_runs([[1, 2], []], []) == [0, 0]
    assert longest_shared_runs([[]], [[]]) == [0]


def plain(text, corpus):
    runs = [
        stop - start
        for start in range(len(text))
        for stop in range(start + 1, len(text) + 1)
        if any(text[start:stop] == one[at : at + stop - start] for one in corpus for at in range(len(one)))
    ]
    return max(runs, default=0)


ids = st.lists(st.integers(0, 2), max_size=20)


@given(st.lists(ids, max_size=4), st.lists(ids, max_size=4))
@settings(max_examples=200, deadline=None)
def test_runs_are_those_of_a_plain_search(texts, corpus):
    assert longest_shared_runs(texts, corpus) == [plain(text, corpus) for text in texts]
