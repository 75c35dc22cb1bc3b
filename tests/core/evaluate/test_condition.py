"""Conditions hold when Python would say so, and are refused where they cannot be read."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regraft.core.errors import UsageError
from regraft.core.evaluate.condition import read_condition

VALUES = {"bpb": 1.5, "told": 0.25, "base.bpb": 1.2}

numbers = st.sampled_from(["0", "1", "2.5", ".5", "1e-3", "bpb", "told"])
sums = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" + ", " - ", "*", " * ", " / "]), inner).map("".join),
        inner.map(lambda one: f"({one})"),
        inner.map(lambda one: f"- {one}"),
    ),
    max_leaves=6,
)
comparisons = st.tuples(st.just("bpb*0+"), sums, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), sums).map("".join)
conditions = st.recursive(
    comparisons,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" and ", " or "]), inner).map("".join), inner.map(lambda one: f"({one})")
    ),
    max_leaves=4,
)


@given(conditions)
def test_it_holds_when_python_says_so(text):
    try:
        expected = eval(text, {}, dict(VALUES))
    except ZeroDivisionError:
        return
    if len(text) <= 500:
        assert read_condition(text).holds(VALUES) == expected


def test_base_alone_is_that_of_the_figure():
    condition = read_condition("bpb > 1.02 * base")
    assert condition.names == {"bpb", "base.bpb"}
    assert condition.holds(VALUES)
    assert not condition.holds({**VALUES, "base.bpb": 1.48})
    assert read_condition("lm-eval.acc_norm < base").names == {"lm-eval.acc_norm", "base.lm-eval.acc_norm"}


def test_what_was_not_measured_does_not_pass():
    for text in ("bpb > 2", "bpb < 2", "bpb / 0 > 1", "bpb == bpb"):
        assert read_condition(text).holds({"bpb": math.nan})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bpb", "a comparison"),
        ("bpb > ", "found: 'the end'"),
        ("bpb >> 1", "character 6"),
        ("bpb > 1 2", "the end, and, or"),
        ("(bpb > 1", "cannot be read"),
        ("bpb > __import__('os')", "cannot be read"),
        ("1 < 2", "names no figure"),
        ("bpb > told + base", "whose base"),
        ("(" * 400 + "bpb", "cannot be read"),
        ("bpb > 1" + " " * 600, "too long"),
        ("", "cannot be read"),
    ],
)
def test_other_texts_are_refused(text, message):
    with pytest.raises(UsageError) as refused:
        read_condition(text)
    assert message in str(refused.value)
