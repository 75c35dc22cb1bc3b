"""From files to sequences: lengths, packing, what is skipped and what is counted."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from regraft.core.data.examples import IGNORED, Example, digest, ints
from regraft.core.data.lengths import pack
from regraft.core.data.load import check_sources, load_data
from regraft.core.data.rows import Place
from regraft.core.data.settings import Data, DataSettings
from regraft.core.errors import InputError, RecipeError, UsageError
from regraft.core.plan import paths_of
from regraft.core.recipe.load import load_recipe
from regraft.core.transformation import Params
from tests.core.data.vocabularies import tokenizer

CODER = tokenizer("characters", bos=False)


def load(tmp_path, lines, *, window=100, seed=0, name="data.jsonl", **settings):
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_data(DataSettings(source=str(path), **settings), CODER, window=window, seed=seed)


def texts(data):
    return [CODER.decode(one.ids) for one in data.examples]


def test_texts_and_counts(tmp_path):
    data = load(tmp_path, [{"text": "abc"}, {"text": "de"}], end=False)
    assert texts(data) == ["abc", "de"]
    assert data.counts == {"rows": 2, "sequences": 2, "bad_rows": 0, "truncated": 0, "split": 0, "dropped": 0,
                           "tokens": 5, "learnt_tokens": 3}  # fmt: skip
    assert list(data.files.values()) == [hashlib.sha256((tmp_path / "data.jsonl").read_bytes()).hexdigest()]


def test_bad_rows_are_skipped_up_to_the_limit(tmp_path):
    lines = [{"text": "abc"}, {"text": ""}, {"text": None}, {"text": "def"}]
    data = load(tmp_path, lines, max_bad_rows=2)
    assert len(data.examples) == 2
    assert [bad.place.number for bad in data.bad] == [2, 3]
    with pytest.raises(InputError, match="max_bad_rows") as caught:
        load(tmp_path, lines, max_bad_rows=1)
    assert caught.value.where.endswith("data.jsonl:3")


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("truncate", ["abcd", "ab"]), ("drop", ["ab"]), ("split", ["abcd", "efgh", "ij", "ab"])],
)
def test_too_long_texts(tmp_path, policy, expected):
    lines = [{"text": "abcdefghij"}, {"text": "ab"}]
    data = load(tmp_path, lines, end=False, too_long=policy, max_tokens=4)
    assert texts(data) == expected
    assert data.counts["truncated" if policy == "truncate" else policy if policy == "split" else "dropped"] == 1


def test_too_long_is_a_bad_row_by_default(tmp_path):
    with pytest.raises(InputError, match="has 5 tokens, expected at most 4"):
        load(tmp_path, [{"text": "abcde"}], end=False, max_tokens=4)


def test_truncation_that_leaves_no_answer_is_a_bad_row(tmp_path):
    lines = [{"prompt": "abcdef", "completion": "gh"}, {"prompt": "ab", "completion": "cdefgh"}]
    data = load(tmp_path, lines, max_tokens=5, too_long="truncate", max_bad_rows=1)
    assert "no answer token is left" in data.bad[0].reason
    assert texts(data) == ["abcde"]
    assert data.examples[0].learnt == 3


def test_pairs_are_truncated_each(tmp_path):
    data = load(tmp_path, [{"prompt": "a", "chosen": "bcdefg", "rejected": "h"}], max_tokens=4, too_long="truncate")
    (pair,) = data.examples
    assert (len(pair.chosen), len(pair.rejected), pair.chosen.learnt, pair.rejected.learnt) == (4, 3, 3, 2)


def test_short_texts_are_dropped(tmp_path):
    data = load(tmp_path, [{"text": "ab"}, {"text": "abcd"}], end=False, min_tokens=4)
    assert texts(data) == ["abcd"]
    assert data.counts["dropped"] == 1


def test_window_bounds_the_sequences(tmp_path):
    with pytest.raises(UsageError, match="window"):
        load(tmp_path, [{"text": "ab"}], window=8, max_tokens=9)
    with pytest.raises(InputError, match="has 9 tokens"):
        load(tmp_path, [{"text": "abcdefgh"}], window=8)


def test_draw_depends_on_the_seed_alone(tmp_path):
    lines = [{"text": f"text {number}"} for number in range(20)]
    one, same, other = (load(tmp_path, lines, max_rows=5, seed=seed) for seed in (1, 1, 2))
    assert len(one.examples) == 5
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize("lines", [[], [{"text": "abcdef"}]])
def test_nothing_to_train_on(tmp_path, lines):
    with pytest.raises(InputError, match="nothing to train on"):
        load(tmp_path, lines, too_long="drop", max_tokens=3)


def test_pairs_are_not_packed(tmp_path):
    with pytest.raises(UsageError, match="cannot be packed"):
        load(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], pack=True)


def test_kinds_are_not_mixed(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n')
    with pytest.raises(UsageError, match="cannot be mixed"):
        load_data(DataSettings(source=str(tmp_path)), CODER, window=50)


def test_folders_are_read_in_order(tmp_path):
    for name in ("b.txt", "a.jsonl", "notes.pdf"):
        (tmp_path / name).write_text('{"text": "first"}' if name == "a.jsonl" else "second")
    assert texts(load_data(DataSettings(source=str(tmp_path), end=False), CODER, window=50)) == ["first", "second"]
    both = (str(tmp_path / "b.txt"), str(tmp_path / "a.jsonl"))
    assert texts(load_data(DataSettings(source=both, end=False), CODER, window=50)) == ["second", "first"]


@pytest.mark.parametrize("source", ["none.jsonl", "./none", "a/b/c"])
def test_paths_that_lead_nowhere(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        load_data(DataSettings(source=source), CODER, window=50)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no data files"):
        load_data(DataSettings(source="empty"), CODER, window=50)


def example(text, first=0):
    ids = ints(range(first, first + len(text)))
    return Example(ids, ids, Place(text, 1))


def test_packing_as_one_stream():
    packed, left = pack([example("abcde", 10), example("fg", 20), example("hijk", 30)], 4, restart=False)
    assert [list(one.ids) for one in packed] == [[10, 11, 12, 13], [14, 20, 21, 30]]
    assert all(one.ids == one.labels and one.positions is None for one in packed)
    assert left == 3
    assert [one.place.file for one in packed] == ["abcde", "abcde"]


def test_packing_with_positions_that_restart():
    packed, left = pack([example("abcde", 10), example("fg", 20), example("hijk", 30)], 4, restart=True)
    assert [list(one.positions) for one in packed] == [[0, 1, 2, 3], [0, 0, 1, 0]]
    assert [list(one.labels) for one in packed] == [[IGNORED, 11, 12, 13], [14, IGNORED, 21, IGNORED]]
    assert packed[1].learnt == 1, "the first token of every text has nothing before it"
    assert left == 3


def test_digest_sees_ids_labels_and_positions():
    ids = ints([1, 2, 3])
    place = Place("a", 1)
    plain = Example(ids, ids, place)
    others = [
        Example(ids, ints([IGNORED, 2, 3]), place),
        Example(ids, ids, place, ids),
        Example(ids[:2], ids[:2], place),
    ]
    assert len({digest([one]) for one in (plain, *others)}) == 4
    assert digest([plain]) == digest([Example(ids, ids, Place("b", 7))])


def test_settings_refuse_unknown_keys():
    with pytest.raises(ValidationError):
        DataSettings(source="a", too_lang="drop")


def test_settings_are_light():
    code = (
        "import sys; import regraft.core.data, regraft.core.data.load, regraft.core.data.batches\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'pyarrow', 'datasets') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


class Tune(Params):
    data: Data


class TuneMethod:
    Params = Tune


def tune(data):
    Path("sub").mkdir()
    Path("sub/texts.jsonl").write_text('{"text": "abc"}')
    Path("sub/r.toml").write_text(f'base.model = "demo:tiny"\n[[steps]]\nuse = "tune"\ndata = {data}\n')
    return load_recipe("sub/r.toml", (), {"tune": TuneMethod}, {})


@pytest.mark.parametrize(
    ("data", "sources"),
    [
        ('"texts.jsonl"', ["texts.jsonl"]),
        ('["texts.jsonl", "org/name"]', ["texts.jsonl", "org/name"]),
        ('{ source = "texts.jsonl", max_tokens = 8 }', ["texts.jsonl"]),
        ('{ source = ["org/name", "missing.csv"], max_tokens = 8 }', ["org/name", "missing.csv"]),
    ],
)
def test_sources_start_at_the_folder_of_the_recipe(tmp_path, monkeypatch, data, sources):
    monkeypatch.chdir(tmp_path)
    recipe = tune(data)
    settings = recipe.steps[0].params.data
    usable = [name if name == "org/name" else f"./sub/{name}" for name in sources]
    assert list(settings.sources) == usable
    assert settings.summary()["max_tokens"] == (8 if "max_tokens" in data else None)
    assert "source" not in settings.summary()
    written = recipe.resolved()["steps"][0]["data"]
    written = written["source"] if isinstance(written, dict) else written
    assert ([written] if isinstance(written, str) else written) == sources
    there = [Path("sub", name) for name in sources if name == "texts.jsonl"]
    assert [path for _, path in paths_of(recipe.steps[0].params)] == there


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("3", ["data", "a source of data (a file, a folder of files, or a hub id)", "found 3"]),
        ('{ source = "a.txt", too_lang = "drop" }', ["data.too_lang", 'did you mean "too_long"?']),
        ('""', ["data", "expected a source of data, found an empty string"]),
    ],
)
def test_data_that_is_written_wrong(tmp_path, monkeypatch, data, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        tune(data)
    for word in words:
        assert word in str(caught.value)


def test_missing_sources_are_found_before_anything_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    check_sources(DataSettings(source=(str(tmp_path / "a.txt"), "org/name")))
    with pytest.raises(UsageError, match="no such file"):
        check_sources(DataSettings(source=(str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))))


def test_the_summary_names_files_without_their_folders(tmp_path):
    data = load(tmp_path, [{"text": "abc"}, {"text": "de"}])
    assert data.summary() == {
        "digest": data.digest, **data.counts, "files": {"data.jsonl": next(iter(data.files.values()))},
    }  # fmt: skip
