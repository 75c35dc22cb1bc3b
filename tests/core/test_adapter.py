"""Adapters as output: what peft makes of the folder is what the checkpoint would have held."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from regraft.core.adapter import check_steps, formed
from regraft.core.errors import Unsupported
from regraft.core.low_rank import LowRankDelta
from regraft.core.patch import DeltaSpec, Edit, Outline, Patch, promise
from regraft.core.sources.folder import open_folder
from regraft.core.tensors import MemoryTensor
from regraft.core.verify.folder import verify_folder
from tests.adapters import write_adapter
from tests.families import FAMILIES, save_tiny
from tests.plugins.lora_merge.adapters import make_adapter, merged_by_peft, merged_by_us, roundings_apart, tensors_of
from tests.running import done, load_recipe, regraft, tree, write_recipe

FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "gpt_neox": FUSED, "falcon": FUSED}
EXPERTS = ("mixtral", "qwen3_moe")


def merge(adapter, **keys):
    return {"use": "lora-merge", "adapter": str(adapter), **keys}


def write(folder, *steps, base="base", **output):
    recipe = write_recipe(folder / "r.toml", folder / base, *steps, format="adapter", **output)
    done("apply", recipe, "-o", folder / "out", "--no-durable")
    return folder / "out"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("llama") / "base", dtype=torch.bfloat16).parent


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in EXPERTS])
def test_an_adapter_comes_out_of_every_family_as_peft_wrote_it(family, tmp_path):
    """Fused, transposed and alternating layouts: the same tensors, and the same bits after peft's merge."""
    base = save_tiny(family, tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(
        base, tmp_path / "a", target_modules=TARGETS.get(family, "all-linear"), rank_pattern={"1": 2}
    )
    out = write(tmp_path, merge(adapter))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, out))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    ours, theirs = tensors_of(merged_by_us(base, adapter)), merged_by_peft(base, out)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_ranks_scales_and_embeddings(llama, tmp_path):
    """Patterns name the modules that differ; peft rounds the delta of an embedding once more than a merge does."""
    adapter = make_adapter(
        llama / "base", tmp_path / "a", target_modules=["embed_tokens", "lm_head", "q_proj", "v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={"v_proj": 0.7},
    )  # fmt: skip
    (tmp_path / "base").symlink_to(llama / "base")
    out = write(tmp_path, merge(adapter, scale=0.3))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^model.layers.1.self_attn.q_proj": 3}
    assert set(config["alpha_pattern"]) == {f"^model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)}
    ours, theirs = tensors_of(merged_by_us(llama / "base", adapter, scale=0.3)), merged_by_peft(llama / "base", out)
    assert roundings_apart(ours, theirs) <= 1.0
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == ["model.embed_tokens.weight"]


def test_several_steps_stack_their_ranks(llama, tmp_path):
    """Against the sum in float64, which a checkpoint rounds once a step and the adapter once in all."""
    (tmp_path / "base").symlink_to(llama / "base")
    first = make_adapter(llama / "base", tmp_path / "a", target_modules=["q_proj", "k_proj"])
    second = make_adapter(llama / "base", tmp_path / "b", target_modules=["q_proj"], r=2, lora_alpha=9, seed=1)
    out = write(tmp_path, {**merge(first), "id": "x"}, {**merge(second, scale=-0.4), "id": "y"})
    name = "model.layers.0.self_attn.q_proj"
    factors = load_file(out / "adapter_model.safetensors")
    assert factors[f"base_model.model.{name}.lora_A.weight"].shape == (6, 64)
    expected = load_file(llama / "base" / "model.safetensors")[f"{name}.weight"].double()
    for adapter, scale in ((first, 6 / 4), (second, -0.4 * 9 / 2)):
        pair = load_file(adapter / "adapter_model.safetensors")
        left, right = (pair[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "BA")
        expected += scale * left @ right
    merged = merged_by_peft(llama / "base", out)[f"{name}.weight"].double()
    assert ((merged - expected).abs() <= expected.abs() * 2.0**-8 + 1e-6).all()


def test_a_small_scale_beside_a_large_one_keeps_its_digits(llama, tmp_path):
    """In fp16 the factor of the second delta would fall below the smallest normal number."""
    (tmp_path / "base").symlink_to(llama / "base")
    modules = {"target_modules": ["q_proj"], "dtype": torch.float16}
    first, second = (
        make_adapter(llama / "base", tmp_path / name, seed=seed, **modules) for seed, name in enumerate("ab")
    )
    out = write(tmp_path, {**merge(first), "id": "x"}, {**merge(second, scale=1e-5), "id": "y"})
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    found, wanted = (
        load_file(out / "adapter_model.safetensors")[name][:, 4:],
        load_file(second / "adapter_model.safetensors")[name].double() * 1.5e-5,
    )
    assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=0)


def test_the_plan_is_exact_and_the_folder_verifies(llama, tmp_path):
    (tmp_path / "base").symlink_to(llama / "base")
    adapter = write_adapter(tmp_path / "a")
    recipe = write_recipe(tmp_path / "r.toml", tmp_path / "base", merge(adapter), format="adapter", dtype="float16")
    plan = done("plan", recipe, "--json").json
    out, again = tmp_path / "out", tmp_path / "again"
    done("apply", recipe, "-o", out, "--threads", "1")
    done("apply", recipe, "-o", again, "--threads", "3")
    assert tree(out) == tree(again)
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "regraft.lock.json"}
    assert {name for name in tree(out) if not name.startswith("regraft/") and name != "regraft"} == files
    sizes = {name: (out / name).stat().st_size for name in (*plan["weight_files"], *plan["files"])}
    assert sizes == {**plan["weight_files"], **plan["files"]}
    assert {tensor.dtype for tensor in load_file(out / "adapter_model.safetensors").values()} == {torch.float16}
    assert str(tmp_path) not in (out / "regraft.lock.json").read_text() + (out / "README.md").read_text()
    report = verify_folder(out)
    assert not report.faults
    assert report.agreeing == 4 + 3  # factors, and the files but for the lock itself
    done("apply", recipe, "-o", out, "--force")
    factors = load_file(out / "adapter_model.safetensors")
    name = next(name for name in factors if name.endswith("lora_A.weight"))
    save_file({**factors, name: factors[name][:1].clone()}, out / "adapter_model.safetensors")
    assert any("factors and config disagree" in finding.message for finding in verify_folder(out).faults)


def refusal(folder, *steps, **output):
    recipe = write_recipe(folder / "r.toml", folder / "base", *steps, path=str(folder / "out"), **output)
    ran = regraft("plan", recipe)
    assert ran.code == regraft("apply", recipe).code != 0
    assert not (folder / "out").exists()
    return ran.err


def test_whatever_is_no_low_rank_delta_is_refused_by_name(llama, tmp_path):
    (tmp_path / "base").symlink_to(llama / "base")
    longer = {"id": "longer", "use": "context-extension", "method": "abf", "target_length": 4096}
    text = refusal(tmp_path, merge(write_adapter(tmp_path / "a")), longer, format="adapter")
    assert "step longer: config.json: an adapter cannot hold this change" in text
    assert 'format = "checkpoint"' in text
    dora = make_adapter(llama / "base", tmp_path / "d", target_modules=["q_proj"], use_dora=True)
    text = refusal(tmp_path, merge(dora), format="adapter")
    assert "step lora-merge: model.layers.0.self_attn.q_proj.weight" in text
    assert "the tensor is rewritten" in text
    assert "quantize is for whole checkpoints" in refusal(
        tmp_path, merge(tmp_path / "a"), format="adapter", quantize="nf4"
    )
    recipe = write_recipe(tmp_path / "v.toml", tmp_path / "base", merge(tmp_path / "a"), format="adapter")
    assert "by its structure alone" in regraft("apply", recipe, "-o", tmp_path / "out", "--verify", "load").err


def test_what_one_step_writes_for_another_is_no_change(llama):
    """As `vlora-train` leaves a generator, which `vlora` uses and leaves behind; a file that stays is refused."""
    base = open_folder(llama / "base", label="base")
    makes = Outline(files={"own/weights": 9}, json={"own/config.json": {"rank": 4}})
    uses = Outline(dropped={"own/weights": "used", "own/config.json": "used"})
    check_steps(base, {"makes": makes, "uses": uses})
    for steps, words in (
        ({"makes": makes}, "step makes: own/config.json"),
        ({"makes": makes, "uses": uses, "again": makes}, "step makes: own/config.json"),
        ({"uses": replace(uses, dropped={"tokenizer.json": "unused"})}, "step uses: tokenizer.json"),
    ):
        with pytest.raises(Unsupported, match=words):
            check_steps(base, steps)


def test_the_form_is_what_the_recipe_says_or_the_steps(llama, tmp_path):
    base, asks = open_folder(llama / "base", label="base"), {"x": Outline(form="adapter"), "y": Outline()}
    files = [
        write_recipe(tmp_path / f"{form}.toml", llama / "base", dtype="float16", **({"format": form} if form else {}))
        for form in (None, "checkpoint")
    ]
    recipes = [load_recipe(file) for file in files]
    forms = [
        formed(recipe, base, outlines)[0].output.format for recipe in recipes for outlines in (asks, {"y": Outline()})
    ]
    assert forms == ["adapter", "checkpoint", "checkpoint", "checkpoint"]
    assert formed(recipes[0], base, asks)[1] == [
        'step x asks for this form, adapter; [output] format = "checkpoint" asks for the other'
    ]


def test_tied_embeddings_and_single_experts_are_refused(tmp_path):
    base = save_tiny("llama-tied", tmp_path / "base")
    tied = make_adapter(base, tmp_path / "a", target_modules=["embed_tokens"], ensure_weight_tying=True)
    assert "embeddings and head are one matrix" in refusal(tmp_path, merge(tied), format="adapter")
    (tmp_path / "m").mkdir()
    mixture = save_tiny("mixtral", tmp_path / "m" / "base")
    experts = make_adapter(mixture, tmp_path / "e", target_modules="all-linear")
    assert "the stock class has no module for it" in refusal(tmp_path / "m", merge(experts), format="adapter")


def test_an_outline_promises_deltas_and_is_held_to_them(llama):
    base = open_folder(llama / "base", label="base")
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = MemoryTensor("l", torch.zeros(64, 2)), MemoryTensor("r", torch.zeros(2, 64))
    patch = Patch(edits={name: Edit(base.specs[name], LowRankDelta(name, *factors, 0.5))})
    outline = Outline.of(patch)
    assert outline.deltas == {name: DeltaSpec(("F32", (64, 2)), ("F32", (2, 64)), 0.5)}
    assert promise(base, outline, by="s").tensors[name].sources == (base.tensors[name],)
    wider = Patch(edits={name: Edit(base.specs[name], LowRankDelta(name, *factors, 0.25))})
    assert outline.deviations(wider) == ["deltas"]
    assert Outline(specs=outline.specs).deviations(patch) == []
