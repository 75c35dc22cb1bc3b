"""Taking an adapter off, sums of adapters, stochastic rounding, and what rounding loses."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.errors import Unsupported
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.lora_merge import LoraMerge
from regraft.plugins.lora_merge.params import LoraMergeParams
from tests.families import save_tiny
from tests.plugins.lora_merge.adapters import make_adapter, merged_by_us, tensors_of
from tests.running import done, write_recipe

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "base", dtype=torch.bfloat16)


def widened(base, folder):
    """The same model in float64."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor.double() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    return folder


def run_of(base, step="s", seed=0, **params):
    checkpoint = open_folder(base, label="base")
    return LoraMerge().apply(checkpoint, LoraMergeParams(**params), Run(step, seed=seed))


def test_merge_and_unmerge_in_float64_is_the_base(llama, tmp_path):
    base = widened(llama, tmp_path / "wide")
    adapter = make_adapter(llama, tmp_path / "a", target_modules="all-linear", use_rslora=True)
    merged = merged_by_us(base, adapter, scale=0.7)
    ours, before = (
        tensors_of(merged_by_us(merged, adapter, scale=0.7, subtract=True)),
        load_file(base / "model.safetensors"),
    )
    assert set(ours) == set(before)
    assert not torch.equal(tensors_of(merged)[Q], before[Q])
    for name, tensor in ours.items():
        assert (tensor - before[name]).norm() <= 1e-15 * before[name].norm(), name


def test_a_bias_of_a_float64_base_keeps_its_width(tmp_path):
    biased = save_tiny("llama-biased", tmp_path / "base")
    base = widened(biased, tmp_path / "wide")
    adapter = make_adapter(biased, tmp_path / "a", target_modules=["q_proj"], lora_bias=True)
    name = Q.replace("weight", "bias")
    added = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{Q.replace('weight', 'lora_B.bias')}"]
    wanted = load_file(base / "model.safetensors")[name] + 1.5 * added.double()
    assert not torch.equal(wanted, wanted.float().double())
    assert torch.equal(merged_by_us(base, adapter).load(name), wanted)


def test_unmerge_in_bf16_errs_by_two_roundings(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["q_proj", "lm_head"])
    merged = merged_by_us(llama, adapter)
    between, after = tensors_of(merged), tensors_of(merged_by_us(merged, adapter, subtract=True))
    for name, before in load_file(llama / "model.safetensors").items():
        size = torch.maximum(between[name].abs(), before.abs()).double()
        assert ((after[name].double() - before.double()).abs() <= size * 2.0**-8 * (1 + 2.0**-8) + 1e-12).all(), name


def test_what_cannot_be_taken_off_is_refused(llama, tmp_path):
    dora = make_adapter(llama, tmp_path / "d", target_modules=["q_proj"], use_dora=True)
    with pytest.raises(Unsupported, match="a DoRA adapter cannot be taken off"):
        merged_by_us(llama, dora, subtract=True)
    whole = make_adapter(llama, tmp_path / "w", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(Unsupported, match="replaced 1 tensors whole"):
        merged_by_us(llama, whole, subtract=True)


def test_a_sum_of_adapters_is_told_of_in_the_plan_and_after_the_run(llama, tmp_path):
    first = make_adapter(llama, tmp_path / "a", target_modules=["q_proj"])
    second = make_adapter(llama, tmp_path / "b", target_modules=["q_proj", "v_proj"], seed=1)
    steps = [
        {"id": name, "use": "lora-merge", "adapter": str(folder)} for name, folder in (("x", first), ("y", second))
    ]
    recipe = write_recipe(tmp_path / "r.toml", llama, *steps)
    note = "2 of these tensors hold the delta of an earlier step already"
    assert note in done("plan", recipe).out
    ran = done("apply", recipe, "-o", tmp_path / "out")
    assert note in ran.out
    rows = json.loads((tmp_path / "out" / "regraft" / "y" / "deltas.json").read_text())
    assert len(rows) == 4
    assert all(row["rank"] == 4 and 0 < row["lost"] < 1 < 1e3 * row["size"] for row in rows.values())


def test_a_delta_below_the_dtype_is_lost_to_nearest_and_kept_on_average_by_chance(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["q_proj"])
    params = {"adapter": adapter, "scale": 1e-3}
    nearest, chance = (run_of(llama, **params, rounding=how) for how in ("nearest", "stochastic"))
    assert nearest.metrics["lost"] > 0.5
    assert any("rounding takes more than 10%" in note for note in nearest.notes)
    assert any("rounded stochastically" in note for note in chance.notes)
    base = load_file(llama / "model.safetensors")[Q]
    pair = load_file(adapter / "adapter_model.safetensors")
    left, right = (pair[f"base_model.model.{Q.removesuffix('.weight')}.lora_{side}.weight"].double() for side in "BA")
    wanted = 1e-3 * 6 / 4 * (left @ right)
    rows = torch.stack([result(run_of(llama, seed=seed, **params, rounding="stochastic"), base) for seed in range(200)])
    kept = rows.mean(0) - base.double()
    cosine = float((kept * wanted).sum() / kept.norm() / wanted.norm())
    once = result(nearest, base) - base.double()
    assert cosine > 0.9
    assert float((once - wanted).norm() / wanted.norm()) > 0.5
    assert torch.equal(rows[3], result(run_of(llama, seed=3, **params, rounding="stochastic"), base))
    assert not torch.equal(rows[3], result(run_of(llama, step="t", seed=3, **params, rounding="stochastic"), base))


def result(patch, base):
    return patch.edits[Q].operation.prepare("cpu")(0, len(base), base).double()


def test_stochastic_bytes_do_not_depend_on_threads(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules="all-linear")
    step = {"use": "lora-merge", "adapter": str(adapter), "rounding": "stochastic"}
    recipe = write_recipe(tmp_path / "r.toml", llama, step)
    for threads in (1, 3):
        done("apply", recipe, "-o", tmp_path / f"out{threads}", "--threads", threads, "--no-durable")
    one, three = ((tmp_path / f"out{threads}" / "model.safetensors").read_bytes() for threads in (1, 3))
    assert one == three
