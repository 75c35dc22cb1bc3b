import pytest

from regraft.core.recipe.suggest import closest, did_you_mean, edit_distance


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("kitten", "sitting", 3),
        ("lofit", "lfoit", 1),
        ("ca", "abc", 3),
        ("use", "uses", 1),
    ],
)
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("contxt-extnsion", "context-extension"),  # two edits
        ("Context_Extension", "context-extension"),  # case and separators are free
        ("context", None),  # a word of it is not a slip of the pen
        ("lofti", "lofit"),
        ("lora", "lora"),
        ("rope", None),  # half of a short word is another word
        ("contextual-extension", "context-extension"),  # further away, but alike
        ("", None),
        ("x" * 1000, None),
    ],
)
def test_closest(word, meant):
    assert closest(word, ["context-extension", "lofit", "lora", "vlora"]) == meant


def test_the_nearest_wins_and_ties_go_to_the_first():
    assert closest("dtyp", ["type", "dtype"]) == "dtype"
    assert closest("aaaab", ["aaaac", "aaaad"]) == "aaaac"
    assert did_you_mean("lfoit", ["lofit"]) == 'did you mean "lofit"?'
    assert did_you_mean("lofit", []) is None
