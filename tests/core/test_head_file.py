"""heads.json: what is written is read, and what is wrong in it is named."""

import json

import pytest

from regraft.core.errors import InputError, UsageError
from regraft.core.head_file import HeadFile, check_heads, read_head_file, read_heads_of


def test_what_is_written_is_read(tmp_path):
    file = HeadFile(((1, 3), (0, 2)), "kv-group", "scale", 2, 4, ((None, 0.25, 1.0, 2.0), (0.1, 0.2, 0.3, 0.4)))
    (tmp_path / "heads.json").write_bytes(file.as_bytes())
    assert read_head_file(tmp_path / "heads.json") == file


def test_a_file_by_hand(tmp_path):
    (tmp_path / "heads.json").write_text('{"heads": [[3, 0], [1, 2]]}')
    assert read_heads_of(tmp_path / "heads.json", 4, 4).heads == ((3, 0), (1, 2))


def test_a_score_that_is_not_finite_is_written_as_null():
    assert json.loads(HeadFile(((0, 0),), scores=((float("nan"), 1 / 3),)).as_bytes())["scores"] == [
        [None, 0.333333333]
    ]


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ('{"heads": []}', ": heads", "names no heads"),
        ('{"heads": {"0": 1}}', ": heads", "names no heads"),
        ('{"heads": [[0, 1], [0]]}', ": heads[1]", "no layer and head"),
        ('{"heads": [[0, -1]]}', ": heads[0]", "no layer and head"),
        ('{"heads": [[0, true]]}', ": heads[0]", "no layer and head"),
        ('{"heads": [[0, 1], [0, 1]]}', ": heads[1]", "named twice"),
        ('{"heads": [[0, 1]], "site": "neuron"}', ": site", "no known kind"),
        ('{"heads": [[0, 1]], "num_heads": 0}', ": num_heads", "no count"),
        ('{"heads": [[0, 1]], "scores": [["a"]]}', ": scores", "are no scores"),
        ('{"heads": [[0, 1]], "scores": 3}', ": scores", "are no scores"),
        ("[[0, 1]]", "", "not a JSON object"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, where, message):
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_head_file(path)
    assert caught.value.where == f"{path}{where}"
    assert caught.value.remedy


def test_no_such_file(tmp_path):
    with pytest.raises(InputError, match="no such file of heads"):
        read_head_file(tmp_path / "heads.json")


def test_heads_of_another_kind(tmp_path):
    (tmp_path / "heads.json").write_bytes(HeadFile(((0, 0),), "kv-group").as_bytes())
    with pytest.raises(InputError, match="of another kind"):
        read_head_file(tmp_path / "heads.json", site="head")


@pytest.mark.parametrize("head", [(2, 0), (0, 4)])
def test_heads_out_of_range(head):
    with pytest.raises(UsageError, match="there is no head") as caught:
        check_heads([(1, 3), head], 2, 4, where="heads.json")
    assert caught.value.expected == "layers 0 to 1, heads 0 to 3"
