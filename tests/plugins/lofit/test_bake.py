"""What is written: biases that do what the offsets did under hooks, in every family that has a place for them."""

import json

import pytest
import torch

from regraft.core.errors import Unsupported
from regraft.core.host import host
from regraft.core.patch import overlay
from regraft.core.transformation import Run
from tests.core.residual.support import hook, load, logits, open_base, written
from tests.core.residual.test_families import ATTENTION, NONE_FOR_ATTENTION, NONE_FOR_VALUES, VALUES
from tests.plugins.lofit.support import lofit

STRONG = {"tune": {"steps": 3, "lr": 0.5}, "scoring": "random", "heads": 3}


def check(done, base, folder):
    """Oracle 2: the written checkpoint computes what hooks with the reported offsets do."""
    _, architecture = open_base(base)
    plain = logits(load(base))
    hooked = logits(hook(load(base), architecture, done.offsets()))
    after = logits(load(written(done.checkpoint, done.patch, folder)))
    assert (hooked - plain).abs().max() >= 0.5
    assert (after - hooked).abs().max() <= 1e-5


def unchanged(done):
    """Oracle 1: every tensor of the base has its bytes, without being computed again."""
    result = overlay(done.checkpoint, done.patch, by="lofit")
    biases = {name for name in done.patch.edits if name.endswith(".bias")}
    for name in done.checkpoint.specs.keys() - biases:
        assert result.raw(name) == done.checkpoint.raw(name) is not None
    return result


@pytest.mark.parametrize(("family", "route"), ATTENTION.items())
def test_heads(family, route, tiny_folder, answers, tmp_path):
    base = tiny_folder(family)
    done = lofit(base, answers, **STRONG)
    assert any(note.endswith(f"attention output: {route}") for note in done.patch.notes)
    check(done, base, tmp_path / "out")
    if not route.startswith("re-expressed"):
        unchanged(done)


@pytest.mark.parametrize(("family", "route"), VALUES.items())
def test_key_value_groups(family, route, tiny_folder, answers, tmp_path):
    base = tiny_folder(family)
    done = lofit(base, answers, site="kv-group", bake="keep-class", **{**STRONG, "heads": 2})
    assert any(note.endswith(f"values: {route}") for note in done.patch.notes)
    check(done, base, tmp_path / "out")
    unchanged(done)


def test_layers_that_are_not_chosen_keep_their_biases(tiny_folder, answers):
    """In place, the plan cannot know which layers are chosen: the others' biases are copied, byte by byte."""
    done = lofit(tiny_folder("gpt2"), answers, **{**STRONG, "heads": 1})
    (layer,) = {layer for layer, _ in done.heads}
    names = [f"transformer.h.{number}.attn.c_proj.bias" for number in range(2)]
    assert set(done.patch.edits) == set(done.outline.specs) == set(names)
    result = unchanged(done)
    for number, name in enumerate(names):
        same = torch.equal(result.load(name), done.checkpoint.load(name))
        assert same == (number != layer)


def test_a_file_of_heads_bounds_the_outline(tiny_folder, answers, tmp_path):
    (tmp_path / "heads.json").write_text('{"heads": [[1, 2]]}')
    done = lofit(tiny_folder("gpt2"), answers, scoring="file", heads_file=tmp_path / "heads.json", tune={"steps": 1})
    assert list(done.outline.specs) == ["transformer.h.1.attn.c_proj.bias"]


def test_sidecar_leaves_the_weights(tiny_folder, answers, tmp_path):
    """For a model with no place for offsets, and for one that is to be steered later."""
    mixtral = lofit(tiny_folder("mixtral"), answers, bake="sidecar-patch", **STRONG)
    assert not mixtral.patch.edits
    assert not mixtral.outline.specs
    assert mixtral.losses[-1] != mixtral.losses[0]
    base = tiny_folder("qwen2")
    later = lofit(base, answers, bake="sidecar-patch", **STRONG)
    assert not later.patch.edits
    assert not later.patch.json
    (tmp_path / "offsets.safetensors").write_bytes(later.patch.reports["offsets.safetensors"].read())
    steer = host().transformations()["steer"]()
    params = steer.Params(vectors=tmp_path / "offsets.safetensors")
    steered = steer.apply(later.checkpoint, params, Run("steer"))
    baked = lofit(base, answers, **STRONG)
    assert baked.patch.reports["offsets.safetensors"] == later.patch.reports["offsets.safetensors"]
    one, other = (overlay(later.checkpoint, patch, by="step") for patch in (steered, baked.patch))
    assert one.config == other.config
    assert one.specs == other.specs
    for name in one.specs:
        assert torch.equal(one.load(name), other.load(name)), name


def test_two_steps_add_up(tiny_folder, answers, tmp_path):
    """Oracle 3: a second step learns on top of the first, whose biases it keeps."""
    base = tiny_folder("llama")
    first = lofit(base, answers, **STRONG)
    between = written(first.checkpoint, first.patch, tmp_path / "between")
    second = lofit(between, answers, **{**STRONG, "layers": 1})
    _, architecture = open_base(base)
    hooked = logits(hook(load(base), architecture, [*first.offsets(), *second.offsets()]))
    after = logits(load(written(second.checkpoint, second.patch, tmp_path / "after")))
    assert (hooked - logits(load(between))).abs().max() >= 0.2
    assert (after - hooked).abs().max() <= 1e-5


def test_in_bfloat16(tiny_folder, answers, tmp_path):
    """Oracle of 2.4: biases are rounded to the checkpoint's dtype, so predictions agree rather than bits."""
    base = tiny_folder("llama", dtype=torch.bfloat16)
    done = lofit(base, answers, **STRONG)
    assert {edit.spec.dtype for edit in done.patch.edits.values()} == {"BF16"}
    _, architecture = open_base(base)
    hooked = logits(hook(load(base), architecture, done.offsets())).log_softmax(-1)
    after = logits(load(written(done.checkpoint, done.patch, tmp_path / "out"))).log_softmax(-1)
    divergence = (hooked.exp() * (hooked - after)).sum(-1)
    assert divergence.max() < 1e-3
    assert (hooked.argmax(-1) == after.argmax(-1)).float().mean() > 0.95


@pytest.mark.parametrize("family", NONE_FOR_ATTENTION)
def test_no_place_for_offsets(family, tiny_folder, answers):
    """Refused by the check, long before anything is learnt."""
    checkpoint, _ = open_base(tiny_folder(family))
    step = host().transformations()["lofit"]()
    with pytest.raises(Unsupported, match="no bias for the attention output") as caught:
        step.check(checkpoint, step.Params(task="sft", data=str(answers)))
    assert caught.value.remedy.endswith('or use bake = "sidecar-patch", which leaves the weights alone and reports the '
                                        "offsets")  # fmt: skip


@pytest.mark.parametrize("family", NONE_FOR_VALUES)
def test_no_place_for_offsets_of_groups(family, tiny_folder, answers):
    with pytest.raises(Unsupported, match="no bias for the values"):
        lofit(tiny_folder(family), answers, site="kv-group")


def test_the_class_is_to_be_kept(tiny_folder, answers):
    with pytest.raises(Unsupported, match="keep-class") as caught:
        lofit(tiny_folder("qwen2"), answers, bake="keep-class")
    assert "kv-group" in caught.value.remedy
    assert "sidecar-patch" in caught.value.remedy


def test_plan_notes(tiny_folder, answers):
    done = lofit(tiny_folder("llama"), answers, **STRONG)
    assert done.outline.notes == ("3 of 8 heads learn an offset; which ones is known after the run",)
    assert done.patch.notes[0] == "3 of 8 heads have learnt an offset (sft)"
    assert done.outline.workspace_bytes > 0
    json.dumps(done.patch.metrics, allow_nan=False)
