"""The merge learner against recounting everything after every merge."""

from collections import Counter
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from regraft.plugins.tokenizer_retrofit.merges import Merge, learn_merges, merged

WORDS = st.dictionaries(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=9).map(tuple), st.integers(1, 9), max_size=30
)


def recount(words, size, *, taken=(), min_count=1, max_length=None):
    """The plainest form: every pair of every word is counted anew for each merge."""
    words, made, merges = dict(words), set(taken), []
    while len(merges) < size:
        counts = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                counts[pair] += count
        fit = [
            (-count, left + right, (left, right))
            for (left, right), count in counts.items()
            if count >= min_count and left + right not in made and len(left + right) <= (max_length or 1 << 30)
        ]
        if not fit:
            break
        count, token, (left, right) = min(fit)
        made.add(token)
        merges.append(Merge(left, right, token, -count))
        rewritten = Counter()
        for word, times in words.items():
            rewritten[replaced(word, left, right)] += times
        words = dict(rewritten)
    return merges


def replaced(word, left, right):
    out, place = [], 0
    while place < len(word):
        both = word[place : place + 2] == (left, right)
        out.append(left + right if both else word[place])
        place += 2 if both else 1
    return tuple(out)


@settings(max_examples=300, deadline=None)
@given(
    WORDS,
    st.integers(0, 40),
    st.integers(1, 4),
    st.none() | st.integers(2, 5),
    st.sets(st.sampled_from(["ab", "bc", "abc"])),
)
def test_the_merges_are_those_of_naive_recounting(words, size, min_count, max_length, taken):
    limits = {"taken": taken, "min_count": min_count, "max_length": max_length}
    assert learn_merges(words, size, **limits) == recount(words, size, **limits)


def test_overlapping_pairs_count_twice_and_merge_once():
    assert learn_merges({("x", "x", "x"): 5}, 2) == [Merge("x", "x", "xx", 10), Merge("xx", "x", "xxx", 5)]
    assert merged(("x", "x", "x"), ("x", "x"), "xx") == ["xx", "x"]


def test_a_token_is_made_in_one_way_only():
    words = {("a", "b", "c"): 9, ("d", "b", "c"): 8, ("a", "b"): 5}
    merges = learn_merges(words, 10)
    assert [merge.token for merge in merges] == ["bc", "abc", "dbc", "ab"]
    assert learn_merges({("a", "bc"): 3, ("ab", "c"): 2}, 10) == [Merge("a", "bc", "abc", 3)]


def test_merges_stop_when_pairs_are_too_rare():
    assert [merge.token for merge in learn_merges({("a", "b"): 3, ("c", "d"): 2}, 10, min_count=3)] == ["ab"]
