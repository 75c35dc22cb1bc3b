"""EAST's vector against its formula, and the baked checkpoint against the vector added by a hook."""

import json
import math

import pytest
import torch

from regraft import InputError, TransformationError, UsageError
from regraft.testing import Conformance, apply_recipe, run_step, save_tiny, write_rows
from regraft_east import East, entropy, first_action, steering_vector

ACTIONS = list("abcdefghijklmnopqrstuvwxyz ")
PARAMS = {"actions": ACTIONS, "layer": 0, "samples": 6, "max_new_tokens": 8}


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("one", "two two", "the river", "a")])


def test_the_formula():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    u = steering_vector(z, torch.tensor([0.0, 1.0, 3.0]), centre=True)
    torch.testing.assert_close(u, torch.tensor([0.75 - 2 / 3, 1.0 - 2 / 3]))
    torch.testing.assert_close(
        steering_vector(z, torch.tensor([0.0, 1.0, 3.0]), centre=False), torch.tensor([0.75, 1.0])
    )
    with pytest.raises(TransformationError, match="do not differ in entropy"):
        steering_vector(z, torch.ones(3), centre=True)
    assert entropy([5, 5]) == pytest.approx(math.log(2))
    assert entropy([7]) == 0
    assert first_action("I take blue, not red", ["red", "blue", "blue, not"]) == "blue, not"
    assert first_action("neither", ["red"]) is None


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_baked_vector_is_the_vector_added_behind_the_layer(family, prompts, tmp_path):
    from transformers import AutoModelForCausalLM

    base = save_tiny(family, tmp_path / "base", tokenizer=True)
    report = apply_recipe(
        base, {"use": East, "id": "east", "prompts": str(prompts), "beta": 3.0, **PARAMS}, to=tmp_path / "out"
    )
    assert report.patches[0].metrics["norm"] > 0
    rows = [json.loads(line) for line in (tmp_path / "out/regraft/east/entropies.jsonl").read_text().splitlines()]
    assert report.patches[0].metrics["mean_entropy"] == pytest.approx(sum(row["entropy"] for row in rows) / 4)
    assert [row["prompt"] for row in rows] == ["one", "two two", "the river", "a"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    states = [model(ids, output_hidden_states=True).hidden_states[1][0, -1].detach() for ids in encoded(base, rows)]
    entropies = torch.tensor([row["entropy"] for row in rows])
    vector = 3 * steering_vector(torch.stack(states), entropies, centre=True)
    layers = model.transformer.h if family == "gpt2" else model.model.layers

    def add(module, arguments, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    layers[0].register_forward_hook(add)
    ids = torch.tensor([[5, 9, 23, 40]])
    baked = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(baked(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def encoded(base, rows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return [tokenizer(row["prompt"], return_tensors="pt")["input_ids"] for row in rows]


def test_refusals(tmp_path, prompts):
    base = save_tiny("llama", tmp_path / "base", tokenizer=True)
    with pytest.raises(UsageError, match="no such layer"):
        run_step(East, base, {**PARAMS, "prompts": str(prompts), "layer": 9})
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"prompt": "one"}\n')
    with pytest.raises(InputError, match="too few"):
        run_step(East, base, {**PARAMS, "prompts": str(empty)})
    empty.write_text("no json\n")
    with pytest.raises(InputError, match="not a prompt"):
        run_step(East, base, {**PARAMS, "prompts": str(empty)})
    with pytest.raises(TransformationError, match="names an action"):
        run_step(East, base, {**PARAMS, "prompts": str(prompts), "actions": ["QQQQ", "ZZZZ"]})


class TestConformance(Conformance):
    transformation = East
    families = ("llama", "qwen2", "gpt2")
