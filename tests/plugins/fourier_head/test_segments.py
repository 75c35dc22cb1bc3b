"""`mode = "segments"`: the forecaster's identities, its training with the model frozen, its export, and bad input."""

import json
import math
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from regraft.core.errors import InputError, RegraftError, Unsupported, UsageError
from regraft.core.patch import overlay
from regraft.core.portable_code import prove
from regraft.core.transformation import Run
from regraft.core.verify.structure import check_structure
from regraft.plugins.fourier_head import FourierHead, regraft_architectures
from regraft.plugins.fourier_head.families import FAMILIES
from regraft.plugins.fourier_head.segments.rewrite import make_patch
from tests.materialise import materialise
from tests.plugins.fourier_head.support import base, change_json, load, opened, stock, token_ids

LENGTH, CONTEXT = 8, 32


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def waves(file, count=3, size=240, **more):
    """Sines of one period, of different phase, height and level."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        places = torch.arange(size, dtype=torch.float64)
        noise = 0.05 * torch.randn(size, generator=generator, dtype=torch.float64)
        values = 5 * number + (number + 1) * (torch.sin(2 * math.pi * (places + number) / 16) + noise)
        rows.append({"series": values.tolist(), "period": 16, **more})
    return write(file, *rows)


def params(data, **values):
    table = {"data": data, "length": LENGTH, "context": CONTEXT, "batch_size": 16, "stride": 2, "epochs": 6, "lr": 0.01}
    return FourierHead.Params(mode="segments", segments={**table, "precision": "float32", **values})


def applied(checkpoint, given, run=None):
    step = FourierHead()
    step.check(checkpoint, given)
    outline = step.plan(checkpoint, given)
    patch = step.apply(checkpoint, given, run or Run("head"))
    assert outline.deviations(patch) == []
    return overlay(checkpoint, patch, by="head"), patch


def untrained(folder, family="llama", **values):
    """The base, and the model as it begins, through its own code."""
    before = base(folder / "base", family)
    patch = make_patch(before, params("none.jsonl", **values), Run("head"))
    return before, load(materialise(overlay(before, patch, by="head"), folder / "out"))


@pytest.fixture(scope="module")
def forecaster(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("untrained"))[1]


def test_forecasts_move_and_stretch_with_the_series(forecaster):
    """f(a x + b) = a f(x) + b for a > 0; the 1e-5 beside the variance is what is left."""
    x = 10 * torch.randn(2, 3 * LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = forecaster.forecast(x, 20)
    assert plain.shape == (2, 20)
    moved = forecaster.forecast(7 * x - 40, 20)
    assert (moved - (7 * plain - 40)).abs().max() < 1e-4 * moved.abs().max()
    assert torch.equal(forecaster.forecast(x[0], 5), forecaster.forecast(x[:1], 5)[0])
    assert torch.allclose(plain[:, :11], forecaster.forecast(x, 11), atol=1e-5)
    long = torch.cat([torch.full((2, 50), 1e3, dtype=torch.float64), x, x], 1)
    assert torch.allclose(forecaster.forecast(long, 9), forecaster.forecast(long[:, -CONTEXT:], 9), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_forecasts_and_still_speaks(family, tmp_path):
    """A segment changes nothing before it, and what is behind it; logits of text keep their bits."""
    before, model = untrained(tmp_path, family, width=12 if family == "gpt2" else None)
    segments = torch.randn(2, 5, LENGTH, generator=torch.Generator().manual_seed(2))
    other = segments.clone()
    other[:, 3] += 1
    with torch.no_grad():
        one, two = model.next_segments(segments), model.next_segments(other)
        assert torch.equal(stock(before)(token_ids()).logits, model(token_ids()).logits)
    assert (one[:, :3] - two[:, :3]).abs().max() < 1e-6
    assert (one[:, 3:] - two[:, 3:]).abs().amax((0, 2)).min() > 1e-4
    findings = check_structure(opened(model.name_or_path), regraft_architectures())
    assert findings == [], [str(finding) for finding in findings]


def test_an_identity_between_a_map_and_its_inverse_gives_the_segment_back(forecaster, monkeypatch):
    class Same(nn.Module):
        def forward(self, inputs_embeds, use_cache):
            del use_cache
            return SimpleNamespace(last_hidden_state=inputs_embeds)

    encoder = forecaster.ts.encoder
    decoder = nn.Linear(64, LENGTH)
    with torch.no_grad():
        inverse = torch.linalg.pinv(encoder.weight)
        decoder.weight.copy_(inverse)
        decoder.bias.copy_(-inverse @ encoder.bias)
        monkeypatch.setattr(forecaster.ts, "decoder", decoder)
        monkeypatch.setattr(forecaster, "model", Same())
        segments = torch.randn(3, 4, LENGTH, generator=torch.Generator().manual_seed(3))
        assert (forecaster.next_segments(segments) - segments).abs().max() < 1e-5
    x = torch.randn(2 * LENGTH, generator=torch.Generator().manual_seed(4))
    found = forecaster.forecast(x, 2 * LENGTH)
    assert torch.allclose(found, x[LENGTH:].repeat(2), atol=1e-4)


def test_the_maps_learn_and_the_model_keeps_its_bytes(tmp_path):
    before = base(tmp_path / "base")
    given = params(waves(tmp_path / "waves.jsonl"))
    after, patch = applied(before, given, Run("head", state=tmp_path / "state"))
    was, now = patch.metrics["held_out_before"], patch.metrics["held_out_after"]
    assert now["mse"] < 0.1 < was["mse"]
    assert now["mse"] < 0.1 * now["mse_of_repeating"]
    assert {name for name in after.specs if name.startswith("ts.")} == set(patch.edits)
    assert all(after.raw(name) == before.raw(name) is not None for name in before.specs)
    assert set(patch.reports) == {"loss.png", "losses.jsonl", "forecast.png"}
    json.dumps(dict(patch.metrics), allow_nan=False)
    again, _ = applied(before, params(given.segments.data, micro_batch=5))
    assert all(torch.allclose(after.load(name), again.load(name), atol=1e-4) for name in patch.edits)

    model = load(materialise(after, tmp_path / "out"))
    row = json.loads((tmp_path / "waves.jsonl").read_text().splitlines()[2])["series"]
    values = torch.tensor(row[:192], dtype=torch.float64)
    error = (model.forecast(values, 24) - torch.tensor(row[192:216])).abs().mean()
    assert error < 0.2 * values.std(), "three segments, rolled out"
    proof = prove(tmp_path / "out")
    assert proof.ok, proof.error
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    again_saved = tmp_path / "again"
    model.save_pretrained(again_saved)
    assert torch.equal(load(again_saved).forecast(values, 24), model.forecast(values, 24))
    with pytest.raises(Unsupported, match="forecasts segments already"):
        FourierHead().check(opened(tmp_path / "out"), given)


def test_stamps_are_mixed_in(tmp_path):
    """Both parts go in at length one, so that the size of a segment's embedding no longer counts."""
    before = base(tmp_path / "base")
    data = waves(tmp_path / "waves.jsonl", count=2, start="2016-07-01 00:00", step=3600)
    after, patch = applied(before, params(data, stamps=True, epochs=1, stride=8, batch_size=8))
    assert after.load("ts.mix_scale").shape == (1,)
    assert after.load("ts.mix_scale").item() != 1
    assert patch.metrics["new_parameters"] == 2 * 64 * LENGTH + 64 + LENGTH + 1
    model, tokenizer = load(materialise(after, tmp_path / "out")), Run("head").tokenizer(before)
    stamps = model.stamps(tokenizer, "2016-07-01", 3600, 5)
    text = tokenizer("Series from 2016-07-01 08:00:00 to 2016-07-01 15:00:00", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.allclose(stamps[1], stock(before).model(text).last_hidden_state[0, -1], atol=1e-5)
        segments = torch.randn(1, 4, LENGTH)
        given = model.ts.embed(segments, stamps[None, :4])
        own = nn.functional.normalize(given - model.ts.mix_scale * nn.functional.normalize(stamps[:4], dim=-1), dim=-1)
        assert torch.allclose(own, nn.functional.normalize(model.ts.encoder(segments), dim=-1), atol=1e-5)
    x = torch.randn(CONTEXT)
    assert model.forecast(x, 16, stamps).shape == (16,)
    assert not torch.equal(model.forecast(x, 16, stamps), model.forecast(x, 16, stamps.flip(0)))
    for wrong, words in (((x, 16), "give them"), ((x, 24, stamps), "6 stamps are needed")):
        with pytest.raises(ValueError, match=words):
            model.forecast(*wrong)


GOOD = {"series": [float(number % 5) for number in range(100)]}
BAD = {
    "no series": ([{"numbers": [1]}], {}, UsageError, "no column is the series"),
    "a text": ([{"series": "1 2 3"}], {}, InputError, "no list of numbers"),
    "not a number": ([GOOD, {"series": [1, "x"]}], {}, InputError, r"series\[1\] is no number"),
    "nan": ([{"series": [1, float("nan")]}], {}, InputError, "not finite"),
    "null": ([{"series": [1, None]}], {}, InputError, "no number"),
    "short": ([{"series": [1.0, 2.0] * 19}], {}, InputError, "fewer windows than a batch"),
    "no dates": ([GOOD], {"stamps": True}, InputError, "does not say when"),
    "a bad date": ([{**GOOD, "start": "July", "step": 1}], {"stamps": True}, InputError, "does not say when"),
    "a bad step": ([{**GOOD, "start": "2016-07-01", "step": 0}], {"stamps": True}, InputError, "does not say when"),
    "too many positions": ([GOOD], {"context": 200 * LENGTH}, UsageError, "more segments than the model has"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path):
    rows, values, kind, words = BAD[case]
    before = base(tmp_path / "base")
    with pytest.raises(kind, match=words):
        applied(before, params(write(tmp_path / "data.jsonl", *rows), **values))


def test_other_bad_input(tmp_path, forecaster):
    before = base(tmp_path / "base")
    with pytest.raises(UsageError, match="no such file"):
        FourierHead().check(before, params(str(tmp_path / "none.jsonl")))
    data = write(tmp_path / "data.jsonl", GOOD)
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        FourierHead().check(opened(tmp_path / "base"), params(data, stamps=True))
    change_json(tmp_path / "base", "config.json", architectures=["LlamaForTokenClassification"])
    with pytest.raises(Unsupported, match="no causal language model"):
        FourierHead().check(opened(tmp_path / "base"), params(data))
    for x, horizon in ((torch.ones(LENGTH - 1), 1), (torch.ones(LENGTH), 0), (torch.full((9,), math.inf), 1)):
        with pytest.raises(ValueError, match="finite numbers are needed"):
            forecaster.forecast(x, horizon)
    for given, words in (
        ({"mode": "segments"}, "belong together"),
        ({"tokens": "0..9", "segments": {"data": "a.jsonl"}}, "belong together"),
        ({"mode": "segments", "segments": {"data": "a.jsonl"}, "bins": 4}, "remove bins"),
        ({"mode": "segments", "segments": {"data": "a.jsonl", "length": 5, "context": 12}}, "a multiple of length"),
    ):
        with pytest.raises(ValueError, match=words):
            FourierHead.Params(**given)


def test_a_step_that_fails_learns_nothing_by_half(tmp_path):
    """A rate that blows up ends in words."""
    data = waves(tmp_path / "waves.jsonl")
    with pytest.raises(RegraftError, match="not finite"):
        applied(base(tmp_path / "base"), params(data, lr=1e38))


def test_the_page_shows_what_is_valid():
    """Its example, and the defaults that it names."""
    text = (Path(__file__).parents[3] / "docs" / "concepts" / "segments.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    step = tomllib.loads(example)["steps"][0]
    settings = FourierHead.Params(**{key: value for key, value in step.items() if key != "use"}).segments
    found = dict(re.findall(r"^\| (`[\w`, ]+`) \| ([\w., -]+) \|", text, re.MULTILINE))
    for keys, values in found.items():
        for key, value in zip(keys.replace("`", "").split(", "), values.split(", "), strict=True):
            default = type(settings).model_fields[key].default
            words = {None: ("none", "length")}.get(default, (str(default).lower(),))
            assert value in words or float(value) == default, key
