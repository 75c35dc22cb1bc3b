"""The unlocked classes against what a mask must and must not change, and the checkpoint as written."""

import json
import subprocess
import sys
from types import MappingProxyType

import pytest
import torch

from regraft import InputError, Unsupported, UsageError
from regraft.testing import Conformance, apply_recipe, run_step, save_tiny, write_rows
from regraft_labels import STOCK, Labels, unlocked
from regraft_labels.fit import fit_head
from regraft_labels.rows import Sentence, first_tokens

WORDS = ["red", "stone", "blue", "leaf", "green", "hill"]
ROWS = [{"tokens": WORDS[at:] + WORDS[:at], "labels": (["ADJ", "N"] * 4)[at % 2 :][:6]} for at in range(6)]


@pytest.fixture
def labelled(tmp_path):
    """Converts a tiny base of a family with a code, and loads the result."""
    from transformers import AutoModelForTokenClassification

    def convert(family, code):
        base = save_tiny(family, tmp_path / f"{family}-base", tokenizer=True)
        rows = write_rows(tmp_path / "rows.jsonl", ROWS)
        out = tmp_path / f"{family}-{code}"
        report = apply_recipe(base, {"use": Labels, "data": str(rows), "labels": ["ADJ", "N"], "code": code}, to=out)
        trust = {"trust_remote_code": True} if "1" in code else {}
        model, found = AutoModelForTokenClassification.from_pretrained(
            out, dtype=torch.float32, output_loading_info=True, **trust
        )
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        return model.eval(), report, out

    return convert


def reach(model):
    """Entry i, j: whether another token at j changes the logits at i."""
    ids = torch.tensor([[5, 9, 23, 40, 61]])
    plain = model(ids).logits[0]
    changed = []
    for place in range(5):
        other = ids.clone()
        other[0, place] = 77
        changed.append((model(other).logits[0] - plain).abs().amax(-1) > 1e-6)
    return torch.stack(changed, 1)


@pytest.mark.parametrize("family", sorted(STOCK))
def test_who_sees_whom(family, labelled):
    causal = torch.ones(5, 5).tril().bool()
    assert (reach(labelled(family, "00")[0]) == causal).all()
    for code in ("01", "10", "11"):
        assert reach(labelled(family, code)[0]).all()


def test_only_the_unlocked_layer_looks_ahead(labelled):
    """With the last layer alone, what stands behind it in the lower one is as in the causal model."""
    both, last = labelled("llama", "00")[0], labelled("llama", "01")[0]
    ids = torch.tensor([[5, 9, 23, 40, 61]])
    states = [model(ids, output_hidden_states=True).hidden_states for model in (both, last)]
    torch.testing.assert_close(states[0][1], states[1][1])
    assert (states[0][2] - states[1][2]).abs().max() > 1e-3


@pytest.mark.parametrize("code", ["00", "01", "11"])
def test_padding_changes_nothing(code, labelled):
    model, _, _ = labelled("llama", code)
    ids = torch.tensor([[5, 9, 23]])
    padded = torch.tensor([[5, 9, 23, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(
        model(padded, attention_mask=mask).logits[:, :3], model(ids).logits, atol=1e-5, rtol=1e-5
    )


def test_code_zero_is_the_stock_class_with_the_fitted_head(labelled):
    model, report, out = labelled("llama", "00")
    assert type(model).__name__ == "LlamaForTokenClassification"
    assert report.patches[0].metrics["held_out_words"] == 6
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config
    assert model.config.id2label == {0: "ADJ", 1: "N"}


LOAD = """
import sys
from transformers import LlamaForTokenClassification
LlamaForTokenClassification.from_pretrained(sys.argv[1])
"""


def test_without_its_code_an_unlocked_model_does_not_load(labelled):
    from transformers import AutoModelForTokenClassification

    _, _, out = labelled("llama", "01")
    ran = subprocess.run([sys.executable, "-c", LOAD, out], capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "regraft_unlocked_sdpa" in ran.stderr
    eager = AutoModelForTokenClassification.from_pretrained(out, trust_remote_code=True, attn_implementation="eager")
    with pytest.raises(ValueError, match="need the attention implementation"):
        eager(torch.tensor([[5, 9]]))


def test_groups_and_first_tokens():
    assert unlocked("01", 5) == [3, 4]
    assert unlocked("1010", 10) == [0, 1, 2, 6, 7]
    assert unlocked("0", 3) == []
    sentence = Sentence(["EU", "rejects", "it"], ["B", "O", "O"])
    offsets = [(0, 0), (0, 1), (1, 2), (2, 5), (5, 10), (10, 13)]
    assert first_tokens(sentence, offsets) == [1, 3, 5]


def test_the_head_is_at_its_minimum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    y = torch.randint(3, (40,), generator=generator)
    weight, bias = fit_head(x, y, 3, 0.01)
    gap = torch.softmax(x.double() @ weight.T + bias, -1) - torch.nn.functional.one_hot(y, 3)
    torch.testing.assert_close(gap.T @ x.double() / 40 + 0.01 * weight, torch.zeros_like(weight), atol=1e-6, rtol=0)
    torch.testing.assert_close(gap.mean(0), torch.zeros_like(bias), atol=1e-6, rtol=0)


def test_refusals(tmp_path):
    rows = str(write_rows(tmp_path / "rows.jsonl", ROWS))
    base = save_tiny("llama", tmp_path / "base", tokenizer=True)
    good = {"data": rows, "labels": ["ADJ", "N"]}
    with pytest.raises(Unsupported, match="no such class"):
        run_step(Labels, save_tiny("gpt2", tmp_path / "gpt2", tokenizer=True), good)
    with pytest.raises(UsageError, match="more groups"):
        run_step(Labels, base, {**good, "code": "010"})
    with pytest.raises(UsageError, match="twice"):
        run_step(Labels, base, {**good, "labels": ["N", "N"]})
    with pytest.raises(InputError, match="unknown label"):
        run_step(Labels, base, {**good, "labels": ["N", "V"]})
    bad = write_rows(tmp_path / "bad.jsonl", [{"tokens": ["a", "b"], "labels": ["N"]}])
    with pytest.raises(InputError, match="not a sentence"):
        run_step(Labels, base, {**good, "data": str(bad)})


class TestConformance(Conformance):
    transformation = Labels
    families = ("llama", "qwen2")
    without = MappingProxyType({"takes_tied_and_untied_heads": "there is no head over the vocabulary afterwards"})
