"""Slices of heads: what belongs to a head by its gradient, and that nothing else moves."""

import json

import pytest
import torch

from regraft.core.errors import InputError, UsageError
from regraft.core.head_file import HeadFile
from regraft.core.sources.open import open_checkpoint
from regraft.core.training.model import materialise_model
from regraft.core.training.tensor_file import read_tensors
from regraft.plugins.fine_tune.target import target_of
from tests.plugins.fine_tune.support import loaded, params, rows, tune, write

FAMILIES = ["llama", "qwen2", "qwen3", "phi3", "gpt2", "gpt_neox", "falcon", "falcon-multi-query", "gemma2", "mixtral"]
HEADS = [(0, 3), (1, 0)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "sums.jsonl", rows())


def mask(spec, one):
    """True where the slice is."""
    inside = torch.zeros(spec.shape, dtype=torch.bool)
    return inside.index_fill(one.axis, torch.tensor(one.indices), True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_is_what_the_head_depends_on(family, tiny_folder):
    """What a head gives to o_proj has gradients in its rows of q, k and v alone, and in all of them; o_proj reads it by
    its columns alone."""
    checkpoint = open_checkpoint(tiny_folder(family, tokenizer=False))
    layer, head = 1, 2
    target = target_of(checkpoint, params(data="x", select="heads", heads=[(layer, head)], kv=True))
    model = materialise_model(checkpoint).requires_grad_(True)
    inputs = {}
    (o_proj,) = [one.parameter for one in target.slices.values() if "o_proj" in one.parameter
                 or one.parameter.endswith(("c_proj.weight", "dense.weight"))]  # fmt: skip
    module = model.get_submodule(o_proj.removesuffix(".weight"))
    module.register_forward_pre_hook(lambda m, args: inputs.update(x=args[0]))
    model(torch.arange(3, 19).view(2, 8))
    size = inputs["x"].shape[-1] // 4
    parameters = dict(model.named_parameters())
    wanted = [one.parameter for one in target.slices.values() if one.parameter != o_proj]
    gradients = torch.autograd.grad(
        inputs["x"][..., head * size : (head + 1) * size].square().sum(), [parameters[name] for name in wanted]
    )
    found = dict(zip(wanted, gradients, strict=True))
    for name, one in target.slices.items():
        inside = mask(target.specs[name], one)
        if one.parameter == o_proj:
            columns = torch.zeros(4 * size, dtype=torch.bool)
            columns[head * size : (head + 1) * size] = True
            expected = columns[:, None] if family == "gpt2" else columns[None]
            assert torch.equal(inside, expected.expand(target.specs[name].shape)), name
        else:
            moving = found[one.parameter] != 0
            assert not (moving & ~inside).any(), f"{name}: the head depends on more"
            assert moving.float().sum() > 0.9 * inside.float().sum(), f"{name}: and on all of it, but for zeros"
    without = target_of(checkpoint, params(data="x", select="heads", heads=[(layer, head)], kv=False))
    assert without.numbers < target.numbers


def test_which_rows_of_shared_key_value_heads(tiny_folder):
    llama = open_checkpoint(tiny_folder("llama", tokenizer=False))  # 4 heads over 2 key-value heads of 16
    q, k, v, o = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo")
    default = target_of(llama, params(data="x", select="heads", heads=[(1, 2)]))
    assert set(default.slices) == {q, o}
    assert default.slices[q].indices == default.slices[o].indices == tuple(range(32, 48))
    assert default.numbers == 2 * 16 * 64
    shared = target_of(llama, params(data="x", select="heads", heads=[(1, 2), (1, 3)], kv=True))
    assert shared.slices[k].indices == shared.slices[v].indices == tuple(range(16, 32)), "one group, once"
    own = open_checkpoint(tiny_folder("llama-multi-head", tokenizer=False))
    assert set(target_of(own, params(data="x", select="heads", heads=[(1, 2)])).slices) == {q, k, v, o}
    assert set(target_of(own, params(data="x", select="heads", heads=[(1, 2)], kv=False)).slices) == {q, o}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_other_byte_stays(family, tiny_folder, data):
    """Weight decay and momentum are on: a masked gradient would move the rest."""
    values = {"select": "heads", "heads": HEADS, "kv": True, "train": {"weight_decay": 0.5}}
    checkpoint, patch, result = tune(tiny_folder(family), data=data, **values)
    target = target_of(checkpoint, params(data=data, **values))
    assert set(patch.edits) == set(target.slices)
    before, after = loaded(checkpoint), loaded(result)
    for name, old in before.items():
        inside = mask(target.specs[name], target.slices[name]) if name in target.slices else None
        same = old.view(torch.int32) == after[name].view(torch.int32)
        if inside is None:
            assert bool(same.all()), name
            assert result.raw(name) == checkpoint.raw(name)
        else:
            assert bool(same[~inside].all()), name
            assert float(same[inside].float().mean()) < 0.02, name
    assert patch.metrics["learnt_numbers"] == target.numbers


OTHERWISE = [{"ema": 0.5}, {"strength": 0.5}, {"train": {"optimizer": "spam"}}, {"train": {"optimizer": "adamw-8bit"}}]


@pytest.mark.parametrize("values", OTHERWISE, ids=str)
def test_neither_do_they_in_bfloat16(values, tiny_folder, data):
    folder = tiny_folder("llama", dtype=torch.bfloat16)
    checkpoint, patch, result = tune(folder, data=data, select="heads", heads=HEADS, **values)
    target = target_of(checkpoint, params(data=data, select="heads", heads=HEADS))
    for name in target.slices:
        inside = mask(target.specs[name], target.slices[name])
        same = checkpoint.load(name).view(torch.int16) == result.load(name).view(torch.int16)
        assert bool(same[~inside].all())
        assert float(same[inside].float().mean()) < 0.5
    assert patch.metrics["changed_tensors"] == len(target.slices) == 4


def test_the_optimiser_knows_slices_alone(tiny_folder, data, tmp_path):
    checkpoint, _, _ = tune(tiny_folder(), data=data, select="heads", heads=[(1, 2)], state=tmp_path / "state")
    (step,) = (tmp_path / "state" / "tune").iterdir()
    tensors, _ = read_tensors(step / "state.safetensors")
    shapes = {tuple(tensor.shape) for name, tensor in tensors.items() if tensor.dim()}
    assert shapes == {(16, 64), (64, 16)}
    moments = [name for name in tensors if name.endswith(("exp_avg", "exp_avg_sq"))]
    assert len(moments) == 4
    assert sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("weights/")) == 2 * 16 * 64
    assert checkpoint.specs["model.layers.1.self_attn.q_proj.weight"].shape == (64, 64)


def test_heads_of_a_file(tiny_folder, data, tmp_path):
    (tmp_path / "heads.json").write_bytes(HeadFile(((1, 2), (0, 1)), scoring="accuracy").as_bytes())
    _, listed, _ = tune(tiny_folder(), data=data, select="heads", heads=[(0, 1), (1, 2)])
    _, named, _ = tune(tiny_folder(), data=data, select="heads", heads=tmp_path / "heads.json")
    assert listed.metrics == named.metrics
    assert listed.notes[0] == "2 heads in 2 layers: 4096 of 78144 numbers learn"


REFUSED = {
    "no such head": ({"heads": [(0, 4)]}, UsageError, "no head 4 of layer 0"),
    "no such layer": ({"heads": [(2, 0)]}, UsageError, "no head 0 of layer 2"),
    "no file": ({"heads": "none.json"}, InputError, "no such file of heads"),
    "key-value heads": ({"heads": "groups.json"}, InputError, "heads are of another kind"),
    "a head out of range in a file": ({"heads": "far.json"}, UsageError, "no head 9 of layer 0"),
    "heads of another model": ({"heads": "other.json"}, UsageError, "a model of another shape"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_heads_are_refused_by_the_plan(case, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "groups.json").write_text(json.dumps({"site": "kv-group", "heads": [[0, 0]]}))
    (tmp_path / "far.json").write_text(json.dumps({"heads": [[0, 9]]}))
    (tmp_path / "other.json").write_text(json.dumps({"heads": [[0, 1]], "num_layers": 3}))
    values, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        target_of(open_checkpoint(tiny_folder()), params(data="x", select="heads", **values))
    assert caught.value.where
    assert caught.value.remedy
