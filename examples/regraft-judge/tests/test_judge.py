"""The decoding loop against greedy generation, the regression against its own conditions, the checkpoint as written."""

import json
import subprocess
import sys

import pytest
import torch

from regraft import InputError, UsageError
from regraft.testing import Conformance, apply_recipe, run_step, save_tiny, tiny, write_rows
from regraft_judge import JudgeHead
from regraft_judge.fit import area, fit, fold, regress
from regraft_judge.runtime import Judge, generate


def judge(threshold, size=64):
    generator = torch.Generator().manual_seed(3)
    return Judge(torch.randn(size, generator=generator), torch.tensor(0.0), threshold)


@pytest.fixture(scope="module")
def models():
    return tiny("llama"), tiny("llama", seed=1)


@pytest.fixture(scope="module")
def drafter():
    """A draft model that agrees often: the target with a little noise."""
    draft = tiny("llama")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return draft


def greedy(model, ids, count, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, **options)


@pytest.mark.parametrize("prompt", [[5, 9, 23], [40], [7, 7, 7, 90, 12]])
def test_with_threshold_zero_the_text_is_the_greedy_one(models, drafter, prompt):
    target, stranger = models
    ids = torch.tensor([prompt])
    expected = greedy(target, ids, 24)
    for draft in (drafter, stranger):
        found = generate(target, draft, ids, judge(0.0), max_new_tokens=24, draft_tokens=5)
        assert found.ids.tolist() == expected.tolist()
        assert found.forgiven == 0
    assert generate(target, target, ids, judge(0.0), max_new_tokens=24, draft_tokens=5).rounds <= 5


def test_above_one_the_text_is_that_of_the_draft_model(models, drafter):
    target, _ = models
    ids = torch.tensor([[5, 9, 23]])
    found = generate(target, drafter, ids, judge(1.1), max_new_tokens=20, draft_tokens=20, eos_token_id=-1)
    alone = drafter.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=-1
    )
    assert found.ids.tolist() == alone.tolist()
    assert (found.rounds, found.proposed, found.agreed + found.forgiven) == (1, 20, 20)


def test_more_is_forgiven_with_a_higher_threshold(models):
    target, stranger = models
    ids = torch.tensor([[5, 9, 23]])
    kept = []
    for threshold in (0.0, 0.3, 0.6, 1.1):
        found = generate(target, stranger, ids, judge(threshold), max_new_tokens=6, draft_tokens=6, eos_token_id=-1)
        kept.append((found.agreed + found.forgiven) / found.rounds)
    assert kept == sorted(kept)
    assert kept[-1] == 6 > kept[0]


def test_the_regression_is_at_its_minimum_and_the_scaler_folds():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = (x[:, 0] - 0.5 * x[:, 3] + 0.3 * torch.randn(60, generator=generator, dtype=torch.float64) > 0.4).double()
    weight, bias = regress(x, y, 0.7)
    share = y.mean()
    residual = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share)) * (torch.sigmoid(x @ weight + bias) - y)
    torch.testing.assert_close(weight + 0.7 * x.T @ residual, torch.zeros(5, dtype=torch.float64), atol=1e-6, rtol=0)
    assert abs(residual.sum()) < 1e-6
    mean, scale = torch.randn(5, generator=generator).double(), torch.rand(5, generator=generator).double() + 0.1
    raw, shift = fold(weight, bias, mean, scale)
    torch.testing.assert_close(x @ raw + shift, (x - mean) / scale @ weight + bias)
    assert area(torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([True, False, True, False])) == 0.875


def test_it_finds_what_matters():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 16, generator=generator)
    found = fit(x, x[:, 2] + x[:, 7] > 0, 0.2, (0.01, 0.1, 1.0), seed=0)
    assert found.auc > 0.95


ROWS = [{"prompt": "one tw", "draft": letter, "matters": letter in "aeiou"} for letter in "abcdefghijklmnop"]
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1] + "/judge")
sys.modules["regraft"] = None
import torch
from transformers import AutoModelForCausalLM
from runtime import Judge, generate
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
found = generate(model, model, torch.tensor([[5, 9]]), Judge.load(sys.argv[1]), max_new_tokens=6, eos_token_id=-1)
print(found.ids.shape[1], found.agreed)
"""


def test_the_checkpoint_decodes_where_regraft_is_not(tmp_path):
    base = save_tiny("llama", tmp_path / "base", tokenizer=True)
    step = {
        "use": JudgeHead,
        "data": str(write_rows(tmp_path / "rows.jsonl", ROWS)),
        "held_out": 0.25,
        "threshold": 0.4,
    }
    report = apply_recipe(base, step, to=tmp_path / "out")
    assert 0 <= report.patches[0].metrics["held_out_auc"] <= 1
    policy = json.loads((tmp_path / "out/judge/policy.json").read_text())
    assert policy == {"threshold": 0.4, "features": "target", "layer": -1}
    assert (tmp_path / "out/config.json").read_bytes() == (base / "config.json").read_bytes()
    ran = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path / "out"], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["8", "6"]
    with pytest.raises(UsageError, match="a judge already"):
        run_step(JudgeHead, tmp_path / "out", {"data": step["data"]})


def test_refusals(tmp_path):
    base = save_tiny("llama", tmp_path / "base", tokenizer=True)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UsageError, match="not a strength"):
        run_step(JudgeHead, base, {"data": str(rows), "c": [0.0]})
    with pytest.raises(InputError, match="matters is true"):
        run_step(JudgeHead, base, {"data": str(write_rows(tmp_path / "one.jsonl", ROWS[1:4]))})
    with pytest.raises(InputError, match="not a row"):
        run_step(JudgeHead, base, {"data": str(write_rows(tmp_path / "bad.jsonl", [{"prompt": "a"}]))})
    with pytest.raises(InputError, match="cannot be read"):
        run_step(JudgeHead, base, {"data": str(tmp_path / "none.jsonl")})


class TestConformance(Conformance):
    transformation = JudgeHead
    families = ("llama", "gpt2")
