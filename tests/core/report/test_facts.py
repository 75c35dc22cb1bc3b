"""Recipes as TOML, figures before and after, places of tensors, tokenizers side by side, and what has changed."""

import json
import math

import pytest
import tomli
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.core.diff import compare_checkpoints
from regraft.core.lock_file import Lock
from regraft.core.report.changes import change_map, from_difference, from_lock
from regraft.core.report.figures import figures, paired
from regraft.core.report.places import Place, places_of
from regraft.core.report.toml_text import toml_text
from regraft.core.report.vocabulary import vocabularies
from regraft.core.sources.folder import open_folder
from tests.checkpoints import write_checkpoint

LEAVES = st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text()
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(min_size=1), DOCUMENTS, max_size=4))
def test_a_recipe_as_toml_reads_back(document):
    assert tomli.loads(toml_text(document)) == document


def test_what_toml_has_no_word_for_is_left_out():
    assert toml_text({"a": None, "steps": [{"id": "x", "none": None, "select": {"lr": 0.5}}]}) == (
        '[[steps]]\nid = "x"\n\n[steps.select]\nlr = 0.5\n'
    )


def test_figures_before_and_after_stand_side_by_side():
    metrics = {"held_out": {"before": {"loss": 2.0}, "after": {"loss": 1.0}}, "rows_before": 7,
               "rows_after": 8, "before": {"x": 1}, "steps": 5, "heads": [[1, 2]]}  # fmt: skip
    pairs, single = paired(metrics)
    assert pairs == {"held_out.loss": (2.0, 1.0), "rows": (7, 8)} or pairs == {
        "held_out.loss": (3, 1.0),
        "rows": (7, 8),
    }
    assert single == {"before.x": 1, "steps": 5, "heads": [[1, 2]]}
    shown = figures({"a_before": 1234, "a_after": 0.5, "b": "text"})
    assert shown.pairs[0].cells == ("1,234", "0.5")
    assert (shown.single[0].name, shown.single[0].numeric) == ("b", False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen3_moe"])
def test_every_tensor_has_its_place(tiny_folder, family):
    checkpoint = open_folder(tiny_folder(family), label="m")
    places = places_of(checkpoint.config, list(checkpoint.specs))
    assert set(places) == set(checkpoint.specs)
    roles = {place.role for place in places.values() if place.layer is not None}
    fused = {"gpt2": "q+k+v_proj", "phi3": "q+k+v_proj"}.get(family, "q_proj")
    assert {fused, "o_proj", "down_proj"} <= roles
    assert not any("." in role for role in roles), roles
    assert {place.role for place in places.values() if place.layer is None} >= {"embed_tokens", "final_norm"}


def test_unknown_families_are_read_off_the_names():
    names = ["net.blocks.3.mix.7.alpha.weight", "net.embed.weight", "layers.1234.x"]
    assert places_of({"model_type": "never-heard-of"}, names) == {
        "net.blocks.3.mix.7.alpha.weight": Place(3, "mix.alpha"),
        "net.embed.weight": Place(None, "net.embed"),
        "layers.1234.x": Place(None, "layers.1234.x"),
    }


def _apart(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def compared(tmp_path, before, after):
    sides = [open_folder(write_checkpoint(tmp_path / name, _apart(tensors)), label=name)
             for name, tensors in (("a", before), ("b", after))]  # fmt: skip
    names = list(dict.fromkeys([*after, *before]))
    return from_difference(compare_checkpoints(*sides), names, sides[1].tensors), names


def test_changes_are_measured_and_named(tmp_path):
    weight = torch.tensor([[3.0, 4.0]])
    before = {"layers.0.w": weight, "layers.1.w": weight, "layers.0.z": torch.zeros(2), "layers.1.gone": weight}
    after = {"layers.0.w": weight * 1.1, "layers.1.w": weight, "layers.0.z": torch.ones(2),
             "layers.0.new": torch.zeros(4), "layers.1.new": weight}  # fmt: skip
    changes, names = compared(tmp_path, before, after)
    kinds = {change.name: change.kind for change in changes}
    assert kinds == {"layers.0.w": "rewritten", "layers.1.w": "copied", "layers.0.z": "rewritten",
                     "layers.0.new": "zeros", "layers.1.new": "added", "layers.1.gone": "removed"}  # fmt: skip
    assert math.isclose(changes[0].relative, 0.1, rel_tol=1e-6)
    drawn = change_map(changes, places_of({}, names), title="t")
    titles = {cell.title for cell in drawn.rectangles}
    assert {"w, layer 0: 0.1", "w, layer 1: unchanged", "new, layer 0: added, all zeros"} <= titles
    assert {"z, layer 0: changed from zeros, or not finite", "gone, layer 1: dropped"} <= titles


def test_of_several_tensors_in_a_cell_the_largest_change_is_shown(tmp_path):
    weight = torch.ones(2, 2)
    names = [f"layers.0.experts.{number}.up.weight" for number in range(3)]
    changes, _ = compared(tmp_path, dict.fromkeys(names, weight), {
        names[0]: weight, names[1]: weight * 1.5, names[2]: weight * 1.25})  # fmt: skip
    (cell,) = change_map(changes, places_of({}, names), title="t").rectangles
    assert cell.title == "experts.up, layer 0: 0.5 (the largest of 3 tensors)"


def test_without_a_change_in_a_layer_there_is_no_map(tmp_path):
    weight = torch.ones(2, 2)
    changes, names = compared(tmp_path, {"layers.0.w": weight, "e": weight}, {"layers.0.w": weight, "e": weight * 2})
    assert change_map(changes, places_of({}, names), title="t") is None


def test_a_lock_file_tells_copied_rewritten_and_added():
    def tensor(digest):
        return {"dtype": "F32", "shape": [2], "file": "f", "digest": digest}

    lock = Lock.model_validate(
        {
            "recipe": {},
            "base": {"model": "m", "tensors": {"a": "x:1", "b": "x:2", "c": "x:3"}},
            "output": {
                "files": {},
                "tensors": {"a": tensor("x:1"), "b": tensor("x:9"), "moved": tensor("x:3"), "d": tensor("x:8"),
                            "linked": tensor(None)},
            },
        }
    )  # fmt: skip
    kinds = {change.name: change.kind for change in from_lock(lock)}
    assert kinds == {"a": "copied", "b": "rewritten", "moved": "copied", "d": "added", "linked": "unknown"}


def test_tokenizers_are_compared_token_by_token(tmp_path):
    def side(name, model, added=(), **parts):
        document = {"model": model, "added_tokens": [{"content": token, "id": at} for token, at in added], **parts}
        files = {"tokenizer.json": json.dumps(document)}
        return open_folder(write_checkpoint(tmp_path / name, {"x": torch.ones(1)}, files=files), label=name)

    before = side("a", {"vocab": {"a": 0, "b": 1, "c": 2}, "merges": ["a b"]}, [("<s>", 3)], pre_tokenizer=None)
    after = side("b", {"vocab": {"a": 0, "c": 1, "d": 2}, "merges": ["a b", "c d"]}, [("<s>", 3)], pre_tokenizer={})
    found = vocabularies(before, after)
    assert (found.tokens, found.merges) == ((4, 4), (1, 2))
    assert (found.added, found.removed, found.renumbered) == (1, 1, 1)
    assert (found.examples, found.gone, found.elsewhere) == (("d",), ("b",), ("pre_tokenizer",))
    unigram = side("c", {"vocab": [["a", -1.0], ["b", -2.0]]})
    assert vocabularies(before, unigram).tokens == (4, 2)
    assert vocabularies(before, before) is None
    assert vocabularies(before, side("d", {"vocab": 7})) is None
