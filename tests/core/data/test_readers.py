"""Rows out of files, with the place of each; and what cannot be read."""

import json
import sys

import pytest

from regraft.core.data.readers import read_datasets, read_file
from regraft.core.data.rows import BadRows
from regraft.core.errors import InputError, UsageError


def rows(path, content, *, bad=None, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_file(path, path.name, bad or BadRows(), **options))


def read(path, content, **options):
    return [(dict(row.values), str(row.place)) for row in rows(path, content, **options)]


def test_json_lines(tmp_path):
    found = read(tmp_path / "a.jsonl", '\ufeff{"text": "é"}\n\n{"text": "b"}')
    assert found == [({"text": "é"}, "a.jsonl:1"), ({"text": "b"}, "a.jsonl:3")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8 text"),
        (b"[1]", "is not a JSON object, found list"),
        (b"null", "is null"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_bad_lines_are_named_and_skipped(tmp_path, line, reason):
    content = b'{"a": 1}\n' + line + b'\n{"a": 2}\n'
    bad = BadRows(1)
    assert [row.values["a"] for row in rows(tmp_path / "a.jsonl", content, bad=bad)] == [1, 2]
    assert str(bad.rows[0]).startswith(f"a.jsonl:2: {reason}")
    with pytest.raises(InputError, match=reason) as caught:
        rows(tmp_path / "a.jsonl", content)
    assert caught.value.where == "a.jsonl:2"


def test_more_bad_rows_than_allowed(tmp_path):
    with pytest.raises(InputError) as caught:
        rows(tmp_path / "a.jsonl", "1\n2\n3\n", bad=BadRows(1))
    assert caught.value.where == "a.jsonl:2"
    assert "a.jsonl:1: is not a JSON object" in caught.value.found


def test_json_list(tmp_path):
    assert read(tmp_path / "a.json", json.dumps([{"a": 1}, {"a": 2}]))[1] == ({"a": 2}, "a.json: row 2")
    for content in ('{"a": 1}', "[1", "\xff"):
        with pytest.raises(InputError, match="is not"):
            read(tmp_path / "a.json", content)


def test_csv(tmp_path):
    found = read(tmp_path / "a.csv", 'q,a\r\n"one\nline",1\r\n\r\ntwo,"a, ""b"""\r\n')
    assert found == [({"q": "one\nline", "a": "1"}, "a.csv:2"), ({"q": "two", "a": 'a, "b"'}, "a.csv:5")]
    assert read(tmp_path / "a.tsv", "q\ta\nx, y\t2\n") == [({"q": "x, y", "a": "2"}, "a.tsv:2")]
    long = "x" * 300_000
    assert read(tmp_path / "a.csv", f"q\n{long}\n")[0][0] == {"q": long}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1", "has 1 fields where the header has 2"),
        (b"1,2,3", "has 3 fields where the header has 2"),
        (b'1,"2"3', "is not CSV"),
        (b"1,\xe9", "is not UTF-8 text"),
    ],
)
def test_bad_csv_rows(tmp_path, line, reason):
    bad = BadRows(1)
    found = rows(tmp_path / "a.csv", b"q,a\n" + line + b"\n3,4\n", bad=bad)
    assert str(bad.rows[0]).startswith(f"a.csv:2: {reason}")
    assert [dict(row.values) for row in found] == [{"q": "3", "a": "4"}]


@pytest.mark.parametrize("header", ["q,q", "q,"])
def test_header_that_names_no_columns(tmp_path, header):
    with pytest.raises(InputError, match="does not name the columns"):
        read(tmp_path / "a.csv", f"{header}\n1,2\n")


def test_plain_text(tmp_path):
    content = "one\ntwo\n\n\n  \nthree\n"
    path = tmp_path / "a.txt"
    assert read(path, content) == [({"text": content}, "a.txt:1")]
    assert read(path, content, text_unit="paragraph") == [
        ({"text": "one\ntwo"}, "a.txt:1"),
        ({"text": "three"}, "a.txt:6"),
    ]
    assert [place for _, place in read(path, content, text_unit="line")] == ["a.txt:1", "a.txt:2", "a.txt:6"]
    with pytest.raises(InputError, match="is not UTF-8"):
        read(path, b"\xff")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "messages": [[{"role": "user"}], []]}), path)
    assert read(path, path.read_bytes()) == [
        ({"prompt": "a", "messages": [{"role": "user"}]}, "a.parquet: row 1"),
        ({"prompt": "b", "messages": []}, "a.parquet: row 2"),
    ]
    with pytest.raises(InputError, match="is not a Parquet file"):
        read(path, b"PAR1 not")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match="needs pyarrow") as caught:
        read(tmp_path / "a.parquet", b"")
    assert "regraft[parquet]" in caught.value.remedy


def test_unknown_suffix_and_missing_file(tmp_path):
    with pytest.raises(UsageError, match="no reader"):
        read(tmp_path / "a.pkl", b"")
    with pytest.raises(InputError):
        list(read_file(tmp_path / "none.jsonl", "none.jsonl", BadRows()))


def test_datasets_library_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        read_datasets("org/name", "org/name", split="train")
    assert "regraft[datasets]" in caught.value.remedy


class FakeDatasets:
    """Stands for the library where it is not installed: what our reader asks of it, and no more."""

    def __init__(self):
        self.asked = []

    def load_from_disk(self, folder):
        return {"train": [{"text": "a"}], "test": [{"text": "b"}, {"text": "c"}]}

    def load_dataset(self, name, subset, split):
        if name == "org/none":
            raise FileNotFoundError(name)
        self.asked.append((name, subset, split))
        return [{"text": "d"}]


def test_datasets_library(tmp_path, monkeypatch):
    library = FakeDatasets()
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = list(read_datasets(str(tmp_path), "folder", split="test"))
    assert [(row.values["text"], str(row.place)) for row in found] == [("b", "folder: row 1"), ("c", "folder: row 2")]
    with pytest.raises(UsageError, match="no such split"):
        read_datasets(str(tmp_path), "folder", split="dev")
    assert [row.values["text"] for row in read_datasets("org/name", "x", split="train", subset="en")] == ["d"]
    assert library.asked == [("org/name", "en", "train")]
    with pytest.raises(InputError, match="cannot open it"):
        read_datasets("org/none", "org/none", split="train")


def test_real_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(str(tmp_path / "saved"))
    found = read_datasets(str(tmp_path / "saved"), "saved", split="train")
    assert [row.values["text"] for row in found] == ["a", "b"]
