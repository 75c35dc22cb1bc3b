"""Time series as bins: windows and their tokens, training, and forecasts of the written checkpoint."""

import json
import math
import tomllib
from pathlib import Path

import numpy
import pytest
import torch
from pydantic import ValidationError

from regraft.core.data.examples import IGNORED
from regraft.core.errors import InputError, UsageError
from regraft.core.transformation import Run
from regraft.plugins.fourier_head.params import LearnSettings, SeriesSettings
from regraft.plugins.fourier_head.series import series_data
from tests.materialise import materialise
from tests.plugins.fourier_head.support import START, applied, base, export, load, params, planned

FORM = {"context": 12, "horizon": 4}


def write(path, *rows):
    path.write_text("\n".join(json.dumps({"series": list(row)}) for row in rows))
    return str(path)


def wave(count=60, shift=0.0, level=10.0):
    return [level + 4 * math.sin(2 * math.pi * (t + shift) / 6) for t in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Digits as bins of series from -2 to 3."""
    folder = tmp_path_factory.mktemp("series")
    return export(base(folder / "base"), folder / "out", series=FORM, range=[-2, 3])


def learn(path, **values):
    return LearnSettings(data={"source": path, **values})


@pytest.mark.parametrize("scaling", ["mean", "standard"])
def test_tokens_are_bins_of_values_scaled_by_the_context(scaling, model, monkeypatch):
    monkeypatch.setitem(model.config.time_series, "scaling", scaling)
    values = numpy.random.default_rng(0).normal(3, 2, (5, 16))
    known = values[:, :12]
    if scaling == "mean":
        scaled = values / abs(known).mean(1, keepdims=True)
    else:
        scaled = (values - known.mean(1, keepdims=True)) / known.std(1, keepdims=True)
    bins = numpy.clip(numpy.floor((scaled + 2) / 5 * 10), 0, 9)
    tokens, location, scale = model.series_tokens(torch.tensor(values), 12)
    assert tokens.tolist() == (START + bins).astype(int).tolist()
    assert ((torch.tensor(values) - location) / scale).numpy() == pytest.approx(scaled)
    level, _, one = model.series_tokens(torch.full((1, 16), 7.0, dtype=torch.float64), 12)
    assert one.item() == (7 if scaling == "mean" else 1)  # no deviation to divide by
    assert len(set(level[0].tolist())) == 1


def test_windows_end_where_the_reserve_begins(model, tmp_path):
    """Neither windows nor what is learnt of them know the reserved values."""
    settings = SeriesSettings(**FORM, stride=7, reserve=5, learn="horizon")
    long, short = wave(60), wave(21, shift=2)
    path = write(tmp_path / "a.jsonl", long, short)
    found = series_data(model, learn(path), settings, seed=0)
    starts = [(long, start) for start in (4, 11, 18, 25, 32, 39)] + [(short, 0)]
    rows = torch.tensor([one[start : start + 16] for one, start in starts], dtype=torch.float64)
    expected, _, _ = model.series_tokens(rows, 12)
    assert [list(one.ids) for one in found.examples] == expected.tolist()
    assert all(list(one.labels) == [IGNORED] * 12 + list(one.ids)[12:] for one in found.examples)
    assert found.counts["windows"] == 7
    assert found.counts["learnt_tokens"] == 28
    assert found.summary()["files"].keys() == {"a.jsonl"}
    changed = write(tmp_path / "b.jsonl", [*long[:-5], *[1e6] * 5], [*short[:-5], *[-1e6] * 5])
    assert series_data(model, learn(changed), settings, seed=0).digest == found.digest
    everything = series_data(model, learn(path), SeriesSettings(**FORM), seed=0)
    assert everything.counts["windows"] == 45 + 6
    assert everything.counts["learnt_tokens"] == 51 * 15
    drawn = series_data(model, learn(path, max_rows=9), SeriesSettings(**FORM), seed=0)
    assert len(drawn.examples) == 9
    far = write(tmp_path / "c.jsonl", [*[1.0, -1.0] * 6, 9, 9, 0, -9])
    assert series_data(model, learn(far), SeriesSettings(**FORM), seed=0).summary()["clipped"] == 3 / 16


def test_short_series_are_refused_with_what_they_lack(model, tmp_path):
    path = write(tmp_path / "a.jsonl", wave(16), wave(20))
    with pytest.raises(InputError, match="this row cannot be used") as caught:
        series_data(model, learn(path), SeriesSettings(**FORM, reserve=1), seed=0)
    assert "expected 17 values (context 12 + horizon 4 + reserve 1), found 16" in str(caught.value)
    found = series_data(model, learn(path, max_bad_rows=1), SeriesSettings(**FORM, reserve=1), seed=0)
    assert found.counts["series"] == found.counts["bad_rows"] == 1


@pytest.mark.parametrize(("family", "values"), [
    ("llama", {}),
    ("llama", {"mode": "replace"}),
    ("llama", {"coordinate": "values", "values": [-3, -2, -1, -0.5, 0, 0.5, 1, 2, 3, 5]}),
    ("gemma2", {"bins": 12}),
    ("gpt2", {"margin": 0.1}),
    ("falcon", {}),
])  # fmt: skip
def test_paths_are_drawn_from_the_head_given_the_values_before(family, values, tmp_path):
    """With a cache and all paths together, as without and one by one; any value of a bin is as likely."""
    model = export(base(tmp_path / "base", family), tmp_path / "out", series=FORM, **values)
    with torch.no_grad():
        model.lm_head.fourier.weight += 0.3 * torch.randn(
            model.lm_head.fourier.weight.shape, generator=torch.Generator().manual_seed(2)
        )
    series = torch.tensor([wave(20), wave(20, shift=1, level=-6)])
    paths = model.forecast(series, 3, samples=4, generator=torch.Generator().manual_seed(5))
    assert paths.shape == (2, 4, 3)
    uniform = torch.rand(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    edges = model.lm_head.edges("cpu")
    for row in range(2):
        known = series[row, -12:].double()[None]
        tokens, location, scale = model.series_tokens(known, 12)
        for number in range(4):
            ids = tokens
            for step in range(3):
                with torch.no_grad():
                    logits = model(ids).logits[0, -1, model.lm_head.start :][: model.lm_head.bins]
                below = torch.cat([torch.zeros(1), logits.double().softmax(-1).cumsum(-1)])
                place = numpy.interp(uniform[row, number, step], below, edges)
                expected = place * scale.item() + location.item()
                assert paths[row, number, step].item() == pytest.approx(expected, rel=1e-3, abs=1e-3)
                token = torch.bucketize(torch.tensor(place), edges[1:-1], right=True)
                ids = torch.cat([ids, model.lm_head.start + token.view(1, 1)], 1)


def test_many_paths_have_the_masses_of_the_head(model):
    paths = model.forecast(torch.tensor([wave(20)]), 1, samples=20_000, generator=torch.Generator().manual_seed(0))
    tokens, _, scale = model.series_tokens(torch.tensor([wave(20)])[:, -12:].double(), 12)
    masses = model.density(tokens).log_masses().exp()[0]
    bins = ((paths.flatten() / scale + 2) * 2).long().flatten()
    assert torch.allclose(torch.bincount(bins, minlength=10) / 20_000, masses, atol=0.015)


def test_the_model_refuses_what_it_cannot_forecast(model, tmp_path):
    for values in ([1.0, 2.0], [[1.0, float("nan")]], [[]]):
        with pytest.raises(ValueError, match="series are finite numbers"):
            model.forecast(torch.tensor(values))
    assert model.forecast(torch.tensor([[1.0]]), samples=1).shape == (1, 1, 4)
    text = export(base(tmp_path / "base"), tmp_path / "out")
    with pytest.raises(ValueError, match="without `series`"):
        text.forecast(torch.tensor([wave()]))


def test_training_learns_a_wave_and_the_checkpoint_says_how_to_forecast(tmp_path):
    path = write(tmp_path / "a.jsonl", *[wave(48, shift=number, level=5 * number) for number in range(5)])
    before = base(tmp_path / "base")
    train = {"data": path, "weights": "full", "epochs": 4, "steps": 40, "lr": 5e-3, "precision": "float32",
             "batch_size": 16, "held_out": 0.2}  # fmt: skip
    series = {**FORM, "scaling": "standard", "period": 6, "reserve": 4}
    after, patch = applied(before, Run("head"), bins=24, range=[-3, 3], num_frequencies=8, series=series, train=train)
    assert after.config["time_series"] == {**FORM, "scaling": "standard", "period": 6}
    figures = patch.metrics["train"]
    assert figures["data"]["windows"] == 5 * 29
    assert figures["held_out_sequences"] == 29  # those of one series, since windows overlap
    assert figures["held_out_after"]["number_nll"] < 1.2 < math.log(24) < figures["held_out_before"]["number_nll"]
    model = load(materialise(after, tmp_path / "out"))
    assert model.config.time_series == {**FORM, "scaling": "standard", "period": 6}
    whole = wave(48, shift=2.0, level=7.0)
    paths = model.forecast(torch.tensor([whole[:-6]]), 6, samples=50, generator=torch.Generator().manual_seed(0))
    middle = paths.median(1).values[0]
    assert (middle - torch.tensor(whole[-6:])).abs().mean() < 1.0  # of a wave 8 high


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"series": {"context": 12}}, "horizon"),
        ({"series": {**FORM, "context": 1}}, "greater than or equal to 2"),
        ({"series": {**FORM, "scaling": "max"}}, "'mean' or 'standard'"),
        ({"range": [-1, 1]}, "range belongs to appended bins"),
        ({"series": FORM, "range": [-1, 1], "coordinate": "values"}, "the values say what the ends are worth"),
        ({"series": FORM, "train": {"data": {"source": "a.jsonl", "pack": True, "max_tokens": 9}}},
         "series are cut into windows by `series`: remove max_tokens, pack of the data"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit(values, fault):
    with pytest.raises(ValidationError, match=fault):
        params(**values)


def test_the_recipe_of_the_guide_is_valid():
    page = (Path(__file__).parents[3] / "docs" / "guide" / "time-series.md").read_text()
    (step,) = tomllib.loads(page.partition("```toml\n")[2].partition("```")[0])["steps"]
    given = params(**{key: value for key, value in step.items() if key != "use"})
    assert given.series is not None
    fields = SeriesSettings.model_fields
    written = {key: line.split("|")[2].strip() for line in page.splitlines() for key in fields
               if line.startswith(f"| `{key}` |")}  # fmt: skip
    assert written == {key: str(fields[key].default) for key in ("scaling", "period", "stride", "learn", "reserve")}


def test_windows_that_the_model_has_no_positions_for(tmp_path):
    checkpoint = base(tmp_path / "base")
    most = checkpoint.config["max_position_embeddings"]
    assert planned(checkpoint, series={"context": most - 4, "horizon": 4})
    with pytest.raises(UsageError, match="longer than the model's window") as caught:
        planned(checkpoint, series={"context": most - 3, "horizon": 4})
    assert caught.value.expected == f"at most {most} values"
