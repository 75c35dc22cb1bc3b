"""The forecast task, of models that know the truth or know nothing, and what it refuses."""

import json
from types import SimpleNamespace

import numpy
import pytest
import torch

from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.evaluate.evaluate import evaluate
from regraft.core.evaluate.forecast import Forecast
from regraft.core.evaluate.metric import Measuring
from regraft.core.evaluate.tasks import read_tasks

SEASON = numpy.array([0.0, 5.0, 1.0, -3.0])


class Truth:
    """Draws from what made the series: a season, and noise of a deviation."""

    def __init__(self, deviation=1.0):
        self.deviation = deviation

    def forecast(self, values, horizon, samples, generator):
        noise = torch.randn(len(values), samples, horizon, generator=generator, dtype=torch.float64)
        return torch.tensor(SEASON[(values.shape[1] + numpy.arange(horizon)) % 4]) + self.deviation * noise


class Single:
    """The same, without drawing."""

    def forecast(self, values, horizon):
        return torch.tensor(SEASON[(values.shape[1] + numpy.arange(horizon)) % 4])[None]


def subject(model, **settings):
    config = {"time_series": settings} if settings else {}
    return SimpleNamespace(model=model, checkpoint=SimpleNamespace(config=config, label="m"), window=64)


@pytest.fixture
def data(tmp_path):
    random = numpy.random.default_rng(0)
    path = tmp_path / "a.jsonl"
    rows = SEASON[numpy.arange(48) % 4] + random.normal(size=(40, 48))
    path.write_text("\n".join(json.dumps({"series": row.tolist(), "period": 4}) for row in rows))
    return path


def measured(model, path, seed=0, **values):
    return Forecast().measure(model, Forecast.Params(data=(str(path),), **values), Measuring(seed))


def test_who_knows_the_truth_is_as_good_as_possible_and_covers_what_it_says(data):
    found = measured(subject(Truth(), horizon=8, context=16, period=4), data, origins=3)
    value = {name: sample.value for name, sample in found.samples.items()}
    assert value["coverage_50"] == pytest.approx(0.5, abs=0.04)
    assert value["coverage_80"] == pytest.approx(0.8, abs=0.04)
    assert value["coverage_95"] == pytest.approx(0.95, abs=0.02)
    assert found.facts["crps_in_units_of_the_data"] == pytest.approx(numpy.pi**-0.5, rel=0.06)  # σ / √π, its mean
    # in the sample errors are differences of two noises, and so are those of the naive forecast out of it
    assert value["naive_mase"] == pytest.approx(1, abs=0.1)
    assert value["mase"] == pytest.approx(2**-0.5, abs=0.1)
    assert value["crps"] < value["naive_crps"] < value["naive_mase"]
    assert found.facts["forecasts"] == 120
    assert found.facts["periods"] == [4]
    assert any("against the seasonal naive forecast: crps -0." in note for note in found.notes)
    assert len(found.curves["crps by step"].ys) == 8
    assert found.curves["coverage"].ys == pytest.approx(found.curves["coverage"].xs, abs=0.06)
    fan = found.fans["forecast 1"]
    assert len(fan.median) == 8
    low, high = fan.bands[0.95]
    assert all(one < other for one, other in zip(low, high, strict=True))


def test_too_narrow_and_too_wide_forecasts_show(data):
    narrow, wide = (measured(subject(Truth(size), horizon=8), data).samples for size in (0.3, 3))
    assert narrow["coverage_80"].value < 0.5
    assert wide["coverage_80"].value > 0.95
    best = measured(subject(Truth(), horizon=8), data).samples["crps"].value
    assert best < narrow["crps"].value
    assert best < wide["crps"].value


def test_a_single_forecast_has_its_mase_for_a_crps(data):
    found = measured(subject(Single()), data, horizon=4)
    assert found.samples["crps"].totals == pytest.approx(found.samples["mase"].totals)
    assert "coverage_50" not in found.samples
    assert "coverage" not in found.curves


def test_forecasts_begin_where_they_should_and_never_see_what_comes(data):
    """Each origin sees all values before it; the seed decides the paths, and so the figures."""
    seen = []

    class Watching(Truth):
        def forecast(self, values, horizon, samples, generator):
            seen.append(values)
            return super().forecast(values, horizon, samples, generator)

    found = measured(subject(Watching(), horizon=4), data, origins=3, step=2, max_series=2, samples=5)
    assert [one.shape[1] for one in seen] == [40, 42, 44] * 2
    first = torch.tensor(json.loads(data.read_text().splitlines()[0])["series"], dtype=torch.float64)
    assert torch.equal(seen[1][0], first[:42])
    assert found.samples["crps"].keys[1] == f"{data}:1@42+4/4"
    again, other = (measured(subject(Truth(), horizon=4), data, seed=seed, samples=5).samples for seed in (0, 1))
    assert again["crps"].totals == measured(subject(Truth(), horizon=4), data, samples=5).samples["crps"].totals
    assert again["crps"].totals != other["crps"].totals


@pytest.mark.parametrize(
    ("model", "settings", "values", "kind", "fault"),
    [
        (object(), {}, {"horizon": 4}, Unsupported, "makes no forecasts"),
        (Truth(), {}, {}, UsageError, "names no horizon"),
        (Truth(), {"horizon": 4, "context": 60}, {"horizon": 5}, Unsupported, "no positions for so long a forecast"),
        (Truth(), {"horizon": "4"}, {}, InputError, "does not say what forecasts"),
        (Truth(), {"horizon": 47}, {}, InputError, "this row cannot be used: series is too short"),
        (Truth(), {"horizon": 4}, {"period": 44}, InputError, "this row cannot be used: series is too short"),
        (Truth(), {"horizon": 44}, {}, InputError, "shorter than a season"),  # of its row
        (Truth(float("nan")), {"horizon": 4}, {}, InputError, "forecast is not finite"),
    ],
)  # fmt: skip
def test_refusals(model, settings, values, kind, fault, data):
    with pytest.raises(kind, match=fault):
        measured(subject(model, **settings), data, **values)


def test_a_series_without_an_error_to_measure_by(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"series": SEASON.tolist() * 4}))
    with pytest.raises(InputError, match="repeats itself exactly") as caught:
        measured(subject(Truth(), horizon=2, period=4), path)
    assert caught.value.where == f"{path}:1, before value 15"


def test_models_are_compared_on_the_same_forecasts_or_not_at_all(data):
    def opened(model, **settings):
        return SimpleNamespace(window=None, load=lambda: subject(model, **settings))

    (task,) = read_tasks([f"forecast:{data} samples=20"], {})
    (outcome,) = evaluate([task], opened(Truth(), horizon=4), opened(Truth(3), horizon=4), Measuring())
    difference = outcome.figures["crps"].difference
    assert difference is not None
    assert difference.high < 0
    assert outcome.figures["naive_crps"].difference.value == 0
    with pytest.raises(UsageError, match="different units"):
        evaluate([task], opened(Truth(), horizon=4), opened(Truth(), horizon=3), Measuring())
