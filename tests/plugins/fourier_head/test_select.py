"""Which tokens are bins, and every range that is none: clear words, and nothing written."""

import json
import shutil
from pathlib import Path

import pydantic
import pytest

from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.sources.folder import open_folder
from regraft.plugins.fourier_head.export import Aim
from tests.plugins.fourier_head.support import BINS, START, change_json, params, planned


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))


def checkpoint(folder):
    return open_folder(folder, label="base")


def add_token(folder, text, index, *, special=False):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    tokenizer["added_tokens"].append({"id": index, "content": text, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    "chosen", [{"tokens": "0..9"}, {"ids": (START, START + BINS - 1)}, {"pattern": "[0-9]"}, {"pattern": r"\d+"}]
)
def test_ways_to_name_the_digits(folder, chosen):
    bins = Aim.of(checkpoint(folder), params(**chosen)).bins
    assert (bins.start, bins.count, bins.vocab_size) == (START, BINS, 128)
    assert bins.texts == tuple("0123456789")
    assert bins.range == (-0.5, 9.5)
    letters = Aim.of(checkpoint(folder), params(tokens="a..f")).bins
    assert (letters.count, letters.texts[-1]) == (6, "f")


def test_values_come_from_the_tokens(folder):
    bins = Aim.of(checkpoint(folder), params(coordinate="values")).bins
    assert bins.edges == tuple(number - 0.5 for number in range(11))
    given = params(coordinate="values", values=(0, 1, 2, 3, 4, 5, 6, 8, 12, 20))
    assert Aim.of(checkpoint(folder), given).bins.edges[-4:] == (7.0, 10.0, 16.0, 24.0)


def test_appended_tokens_use_padding_first(folder):
    bins = Aim.of(checkpoint(folder), params(bins=8)).bins
    assert (bins.start, bins.vocab_size, bins.range) == (99, 128, (-1.0, 1.0))
    assert Aim.of(checkpoint(folder), params(bins=60)).bins.vocab_size == 159


def refused(folder, kind, words, **values):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(kind) as caught:
        planned(checkpoint(folder), **values)
    assert words in str(caught.value), str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    return caught.value


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("there are as many frequencies as bins, or more", {"num_frequencies": 10}),
        ("matches no two tokens", {"pattern": "[0-9]{2}"}),
        ("is no regular expression", {"pattern": "[0-9"}),
        ("behind '9'", {"pattern": "[0-9A-C]"}),
        ("the vocabulary does not have all these tokens", {"tokens": "0..199"}),
        ("does not name a range of tokens", {"tokens": "0-9"}),
        ("are fewer than two bins", {"tokens": "7..7"}),
        ("there is no such token id", {"ids": (100, 128)}),
        ("special tokens", {"ids": (1, 30)}),
        ("a token of the range is no number", {"tokens": "a..f", "coordinate": "values"}),
        ("not one value for each bin", {"coordinate": "values", "values": (1.0, 2.0, 3.0)}),
    ],
)
def test_ranges_that_are_none(folder, words, values):
    error = refused(folder, UsageError, words, **values)
    assert error.where


def test_ids_with_a_gap(folder):
    add_token(folder, "10", 99)
    error = refused(folder, UsageError, "not one range of ids in ascending order", tokens="0..10")
    assert "'10' with id 99" in error.found
    assert "id 30 behind '9'" in error.expected


def test_values_that_do_not_ascend(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["3"], vocabulary["4"] = vocabulary["4"], vocabulary["3"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(folder, UsageError, "do not ascend", ids=(START, START + 9), coordinate="values")
    refused(folder, UsageError, "not one range of ids in ascending order", tokens="0..9")


def test_special_tokens_that_only_configs_name(folder):
    change_json(folder, "config.json", eos_token_id=[2, START + 3])
    assert f"id {START + 3}" in refused(folder, UsageError, "special tokens").found


def test_tokenizer_that_does_not_fit(folder):
    add_token(folder, "big", 128)
    refused(folder, InputError, "ids beyond the embedding's rows")


def test_taken_names_and_missing_tokenizer(folder):
    add_token(folder, "<bin_3>", 99)
    assert "<bin_3>" in refused(folder, UsageError, "such a token already", bins=5).found
    (folder / "tokenizer.json").unlink()
    for values in ({"bins": 5}, {"tokens": "0..9"}, {"pattern": "[0-9]"}):
        refused(folder, Unsupported, "tokenizer.json, which the checkpoint does not have", **values)
    assert planned(checkpoint(folder), ids=(START, START + 9)).specs


def test_models_whose_head_stays(folder):
    for values, words in (
        ({"model_type": "mixtral"}, "the head of this family cannot be replaced"),
        ({"model_type": "fourier_llama"}, "has a Fourier head already"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "another model than the causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "mine.Model"}}, "a model class of its own"),
    ):
        before = (folder / "config.json").read_bytes()
        change_json(folder, "config.json", **values)
        refused(folder, Unsupported, words)
        (folder / "config.json").write_bytes(before)


def test_weights_that_do_not_fit(folder, tmp_path):
    import torch
    from safetensors.torch import save_file

    from tests.plugins.fourier_head.support import applied

    refused(folder, InputError, "there is no such file", weights=tmp_path / "none.safetensors")
    file, name = tmp_path / "head.safetensors", "fc_extract_autocorrelation_params"
    file.write_bytes(b"not tensors")
    shapes = {"not a": None, "frequencies": (8, 64), "finite": (10, 64)}
    for words, shape in shapes.items():
        if shape is not None:
            weight = torch.full(shape, torch.nan)
            save_file({f"{name}.weight": weight, f"{name}.bias": torch.zeros(shape[0])}, file)
        with pytest.raises(InputError, match=words if shape else "cannot be read as a .safetensors file"):
            applied(checkpoint(folder), weights=file)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("found none of them", {"tokens": None}),
        ("found tokens, bins", {"tokens": "0..9", "bins": 9}),
        ("mode replace takes the whole vocabulary", {"mode": "replace", "tokens": "0..9"}),
        ("no gate", {"mode": "replace", "tokens": None, "gate": "keep_rows"}),
        ("below the number of bins", {"tokens": None, "bins": 12, "num_frequencies": 12}),
        ("ascending", {"tokens": None, "bins": 40, "range": (1, 1)}),
        ("range belongs to appended bins", {"range": (0, 1)}),
        ("first and the last", {"tokens": None, "ids": (9, 3)}),
        ("unequal width", {"quadrature": "midpoint", "coordinate": "values"}),
        ("a margin needs", {"quadrature": "midpoint", "margin": 0.1}),
        ("strictly ascending", {"coordinate": "values", "values": (0, 0)}),
        ("coordinate", {"values": (0, 1)}),
        ("finite", {"coordinate": "values", "values": (0, float("nan"))}),
        ("less than or equal to 1", {"floor": 2}),
        ("less than 1", {"margin": 1}),
        ("equal width", {"tokens": None, "bins": 20, "coordinate": "values"}),
        ("no head before", {"tokens": None, "bins": 20, "calibrate": {"data": "x.txt"}}),
        ("calibrate follows the old head", {"train": {"data": "x.txt", "target": "base"}}),
        ("the head alone", {"calibrate": {"data": "x.txt", "weights": "full"}}),
    ],
)
def test_parameters_that_contradict_each_other(words, values):
    from regraft.plugins.fourier_head import FourierHead

    given = {"num_frequencies": 4, "tokens": "0..9", **values}
    with pytest.raises(pydantic.ValidationError, match=words):
        FourierHead.Params(**{name: value for name, value in given.items() if value is not None})
