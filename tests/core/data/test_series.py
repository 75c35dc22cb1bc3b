"""Series out of data files, and what is none."""

import json

import pytest

from regraft.core.data.series import read_series
from regraft.core.data.settings import DataSettings
from regraft.core.errors import InputError, UsageError


def read(folder, *rows, least=2, **options):
    path = folder / "a.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_series(DataSettings(source=str(path), **options), least=least, why="1 + 1")


def test_series_and_periods(tmp_path):
    rows = [
        {"series": [1, 2.5]},
        {"Target": [3, 4, 5], "period": 12, "id": "x"},
        {"values": [0, 1e300], "period": None},
    ]
    found, bad = read(tmp_path, *rows)
    assert [(list(one.values), one.period) for one in found] == [([1, 2.5], None), ([3, 4, 5], 12), ([0, 1e300], None)]
    assert [one.place.number for one in found] == [1, 2, 3]
    assert bad.rows == []
    (own,), _ = read(tmp_path, {"series": [1, 1], "x": [7, 8], "m": 2}, columns={"series": "x", "period": "m"})
    assert (list(own.values), own.period) == ([7, 8], 2)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"series": []}, "series is empty"),
        ({"series": [3]}, "series has one value, and no other to forecast"),
        ({"series": [1, 1.0, 1]}, "series is constant: there is nothing to forecast, found 1 everywhere"),
        ('{"series": [1, NaN]}', "series[1] is not finite: fill the gap, or cut the series there, found nan"),
        ('{"series": [1, -Infinity]}', "series[1] is not finite"),
        (f'{{"series": [1, {10**310}]}}', "series[1] is not finite"),
        ({"series": [1, None]}, "series[1] is no number, found None"),
        ({"series": [True, 2]}, "series[0] is no number, found True"),
        ({"series": [1, "2"]}, "series[1] is no number"),
        ({"series": "1,2"}, "series is no list of numbers"),
        ({"series": [1, 2, 3]}, "series is too short, expected 4 values (1 + 1), found 3"),
        ({"series": [1, 2, 3, 4], "period": 0}, "period is no period, expected a whole number from 1, found 0"),
        ({"series": [1, 2, 3, 4], "period": 1.5}, "period is no period"),
    ],
)
def test_what_is_no_series_is_named_and_skipped(tmp_path, row, reason):
    good = {"series": [1, 2, 3, 4]}
    found, bad = read(tmp_path, good, row, good, least=4, max_bad_rows=1)
    assert len(found) == 2
    assert str(bad.rows[0]).startswith(f"{tmp_path}/a.jsonl:2: {reason}")
    with pytest.raises(InputError, match="this row cannot be used") as caught:
        read(tmp_path, good, row, least=4)
    assert caught.value.where == f"{tmp_path}/a.jsonl:2"


def test_no_series_or_no_column(tmp_path):
    with pytest.raises(InputError, match="the data has no series"):
        read(tmp_path)
    for row, fault in (
        ({"text": "a"}, "no column is the series"),
        ({"series": [1, 2], "values": [1, 2]}, "several columns may be the series"),
    ):
        with pytest.raises(UsageError, match=fault):
            read(tmp_path, row)
    with pytest.raises(UsageError, match="no column is the series") as caught:
        read(tmp_path, {"series": [1, 2]}, columns={"series": "x"})
    assert caught.value.expected == "a column x"
    with pytest.raises(UsageError, match="no such role"):
        read(tmp_path, {"series": [1, 2]}, columns={"text": "series"})
