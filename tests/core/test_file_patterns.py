"""Patterns of files as sources of data: what they match, what is recorded of them, and where they start."""

import hashlib
import json
from pathlib import Path

import pytest

from regraft.core.data.load import files_of
from regraft.core.data.names import distinct_names
from regraft.core.data.settings import Data, DataSettings
from regraft.core.errors import UsageError
from regraft.core.file_patterns import from_pattern, matched
from regraft.core.provenance import data_digests
from regraft.core.transformation import Params
from tests.core.learning import HOST, ONE, RAN
from tests.running import done, regraft, write_recipe


@pytest.fixture
def texts(tmp_path):
    root = tmp_path / "odd [1]"
    for name in ("b.txt", "a.txt", "a.jsonl", "inner/c.txt", "notes.log", ".hidden.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text of {name}")
    return root


def test_what_a_pattern_matches(texts):
    def found(pattern):
        return [path.relative_to(texts).as_posix() for path in files_of(str(texts / pattern))]

    assert found("*.txt") == ["a.txt", "b.txt"]
    assert found("**/*.txt") == ["a.txt", "b.txt", "inner/c.txt"]
    assert found("?.*") == ["a.jsonl", "a.txt", "b.txt"]
    assert found("*/c.txt") == ["inner/c.txt"]
    for none in ("*.csv", "*.log", "nowhere/*.txt"):
        with pytest.raises(UsageError, match="no data file matches the pattern"):
            found(none)
    (texts / "a*").mkdir()  # a folder of that name is what is meant
    (texts / "a*" / "own.txt").write_text("x")
    assert found("a*") == ["a*/own.txt"]
    assert from_pattern(f"{texts}/**/*.txt") == "**/*.txt"
    assert list(matched(texts / "*/*.txt")) == ["a*/own.txt", "inner/c.txt"]


def test_digests_name_every_file_of_a_pattern(texts):
    class Files(Params):
        data: Data

    found = data_digests(Files(data=DataSettings(source=f"{texts}/**/*.txt")))
    names = ("a.txt", "b.txt", "inner/c.txt")
    assert found == {"data.source[0]": {name: hashlib.sha256(f"text of {name}".encode()).hexdigest() for name in names}}


def test_files_of_one_name_are_told_apart_wherever_they_stand():
    for root in ("", "/far/away/", "here/"):
        assert list(distinct_names([f"{root}en/train.txt", f"{root}nl/train.txt", f"{root}x.txt"]).values()) == [
            "en/train.txt", "nl/train.txt", "x.txt"
        ]  # fmt: skip
        deep = distinct_names([f"{root}a/v/t.txt", f"{root}b/v/t.txt", f"{root}t.txt"])
        assert list(deep.values()) == ["a/v/t.txt", "b/v/t.txt", "t.txt"]
    assert set(distinct_names(["/home/one/t.txt", "/data/two/t.txt", "/data/two/t.txt"]).values()) == {
        "one/t.txt", "two/t.txt"
    }  # fmt: skip


def test_a_recipe_records_the_pattern_and_the_files_and_reproduce_wants_the_same_ones(cache, monkeypatch):
    monkeypatch.setattr("regraft.core.host.host", lambda: HOST)
    Path("recipes/texts").mkdir(parents=True)
    for name in "ab":
        Path(f"recipes/texts/{name}.txt").write_text(name)
    write_recipe(Path("recipes/r.toml"), Path("base").resolve(), {**ONE, "data": "texts/*"}, path="out")
    for _ in range(2):
        done("apply", "recipes/r.toml", "--no-durable", "--force")
    assert RAN == ["one"], "the second time is from the cache"
    step = json.loads(Path("out/regraft.lock.json").read_text())
    assert step["recipe"]["steps"][0]["data"]["source"] == "texts/*"
    assert list(step["steps"][0]["data"]["data.source[0]"]) == ["a.txt", "b.txt"]
    done("reproduce", "out", "--inputs", "recipes", "--base", "base")
    Path("recipes/texts/c.txt").write_text("c")
    told = regraft("reproduce", "out", "--inputs", "recipes", "--base", "base")
    assert told.code == 3
    assert "one.data.source[0]: 3 files, not the recorded 2 files" in told.err
    RAN.clear()
    done("apply", "recipes/r.toml", "--no-durable", "--force")
    assert RAN == ["one"], "another file is another key"


def test_an_absolute_pattern_leaves_no_folder_in_the_lock_file(workplace, monkeypatch):
    monkeypatch.setattr("regraft.core.host.host", lambda: HOST)
    Path("texts/inner").mkdir(parents=True)
    Path("texts/inner/a.txt").write_text("a")
    write_recipe(Path("r.toml"), "base", {**ONE, "data": f"{Path('texts').resolve()}/**/*.txt"}, path="out")
    done("apply", "r.toml", "--no-durable")
    text = Path("out/regraft.lock.json").read_text()
    assert str(Path.cwd()) not in text
    assert json.loads(text)["recipe"]["steps"][0]["data"]["source"] == "**/*.txt"
