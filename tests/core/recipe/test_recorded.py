"""What a lock file records of a step is a step again, also where parameters exclude each other."""

import pytest

from regraft.core.testing.running import make_recipe

STEPS = [
    {"use": "grow", "layers": 3},
    {"use": "grow", "intermediate_size": 128, "new_neurons": "zero"},
    {"use": "prune", "score": "magnitude", "sparsity": 0.5},
    {"use": "prune", "sparsity": 0.5, "data": "rows.jsonl"},
    {"use": "steer", "vectors": "vectors.safetensors", "strength": 2.0},
    {"use": "fine-tune", "data": "rows.jsonl"},
    {"use": "hyperfitting", "data": "rows.jsonl"},
    {"use": "context-extension", "method": "yarn", "target_length": 4096},
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["use"])
def test_a_resolved_step_is_the_same_step_again(tmp_path, monkeypatch, step):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "vectors.safetensors"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    recipe = make_recipe("demo:tiny", step)
    (resolved,) = recipe.resolved()["steps"]
    again = make_recipe("demo:tiny", resolved)
    assert again.steps[0].params == recipe.steps[0].params
    assert {key: resolved[key] for key in step} == {**step, **({"data": resolved["data"]} if "data" in step else {})}


def test_defaults_are_recorded_where_they_may_be_written():
    recipe = make_recipe("demo:tiny", {"use": "context-extension", "method": "yarn", "target_length": 4096})
    assert len(recipe.resolved()["steps"][0]) > 4
