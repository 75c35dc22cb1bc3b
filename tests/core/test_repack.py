"""Outputs that stay quantised: what no step touches is copied, and what changes is stored in the base's form."""

import json
import logging
from dataclasses import replace

import pytest

from regraft.core.cast import cast_patch
from regraft.core.checkpoint import CONFIG
from regraft.core.errors import Unsupported
from regraft.core.layout import lay_out
from regraft.core.operations import Convert, Value
from regraft.core.patch import Edit, Outline, Patch, overlay, promise
from regraft.core.repack import repack
from regraft.core.sources.open import open_checkpoint
from regraft.core.tensors import MemoryTensor
from tests.adapters import write_adapter
from tests.core.gguf.writing import write_model
from tests.core.quantising import delta
from tests.core.sources.test_bitsandbytes import KINDS, quantise
from tests.families import save_tiny, tiny
from tests.materialise import materialise
from tests.running import ABF, done, regraft, write_recipe

pytestmark = [
    # torch's own compiler, imported by bitsandbytes, still uses what torch deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

WHOLE_BLOCKS = {
    "llama": {"intermediate_size": 128},
    "qwen3": {"intermediate_size": 128, "head_dim": 32},
    "gpt2": {"n_inner": 128},
}
"""Rows of whole blocks: with others bitsandbytes' CPU kernels fail (see kernels/four_bit.py)."""

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes warns of every cast of an activation."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny quantised models, by (family, kind); made when first asked for."""
    import torch

    root = tmp_path_factory.mktemp("quantised")

    def folder(family: str, kind: str):
        base, target = root / family, root / f"{family}-{kind}"
        if not base.exists():
            save_tiny(family, base, dtype=torch.bfloat16, **WHOLE_BLOCKS[family])
        return target if target.exists() else quantise(base, target, **KINDS[kind])

    return folder


def merged(base, *names, size=1.0):
    """`base` with a delta on each of the weights."""
    specs = [base.specs[name] for name in names]
    edits = {spec.name: Edit(spec, delta(spec.name, *spec.shape, size)) for spec in specs}
    return overlay(base, Patch(edits=edits), by="merge")


@pytest.mark.parametrize("kind", KINDS)
def test_an_untouched_base_is_copied_file_by_file(folders, kind):
    base = open_checkpoint(folders("llama", kind))
    kept = repack(base, base).checkpoint
    (shard,) = lay_out(kept, 1 << 40).shards
    assert shard.source == folders("llama", kind) / "model.safetensors"
    assert kept.files[CONFIG].read() == (folders("llama", kind) / CONFIG).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_tensors_of_changed_weights_are_computed(folders, kind):
    base = open_checkpoint(folders("llama", kind))
    repacked = repack(base, merged(base, Q_PROJ, DOWN))
    kept, stored = repacked.checkpoint, base.packed
    assert list(kept.tensors) == list(stored.tensors)
    changed = {name for name in kept.tensors if kept.raw(name) != stored.raw(name)}
    ends = {
        "int8": ("weight", "SCB"),
        "nf4-double": ("weight", "weight.absmax", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"),
    }.get(kind, ("weight", "weight.absmax"))
    assert changed == {f"{name.removesuffix('weight')}{end}" for name in (Q_PROJ, DOWN) for end in ends}
    assert "12 weights are copied as they are, 2 changed ones are quantised again" in repacked.note


@pytest.mark.parametrize("kind", ["nf4-double", "fp4"])
def test_a_delta_of_zero_leaves_codes_and_scales(folders, kind):
    import torch

    base = open_checkpoint(folders("llama", kind))
    zero = replace(delta(DOWN, *base.specs[DOWN].shape), left=MemoryTensor("l", torch.zeros(64, 4)))
    above = overlay(base, Patch(edits={DOWN: Edit(base.specs[DOWN], zero)}), by="merge")
    repacked = repack(base, above)
    for name, tensor in repacked.checkpoint.tensors.items():
        if "quant_state" not in name:
            assert torch.equal(tensor.load(), base.packed.load(name)), name
    text = f"{DOWN}.quant_state.bitsandbytes__{kind[:3]}"
    documents = [json.loads(bytes(each.load(text).numpy())) for each in (repacked.checkpoint, base.packed)]
    assert documents[0] == documents[1]
    assert repacked.realised.total() is None


def test_new_layers_are_quantised_and_other_new_matrices_are_listed(folders):
    import torch

    base = open_checkpoint(folders("llama", "nf4-double"))
    new = {"model.layers.2.self_attn.q_proj.weight": (64, 64), "judge.weight": (2, 64), "judge.bias": (2,)}
    values = {name: MemoryTensor(name, torch.randn(shape).bfloat16()) for name, shape in new.items()}
    renamed = {"model.layers.5.self_attn.q_proj.weight": Q_PROJ}
    edits = {name: Edit(tensor.spec, Value(tensor)) for name, tensor in values.items()}
    kept = repack(base, overlay(base, Patch(edits=edits, renames=renamed), by="grow")).checkpoint
    assert kept.specs["model.layers.2.self_attn.q_proj.weight"].dtype == "U8"
    assert kept.specs["judge.weight"].dtype == "BF16"
    assert kept.config["quantization_config"]["llm_int8_skip_modules"] == ["lm_head", "judge"]
    for end in ("", ".absmax", ".nested_absmax", ".quant_state.bitsandbytes__nf4"):
        assert kept.raw(f"model.layers.5.self_attn.q_proj.weight{end}") == base.packed.raw(f"{Q_PROJ}{end}")
        assert f"{Q_PROJ}{end}" not in kept.tensors


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("skipped", "plain"),
    [("2.mlp.down_proj", {"3.mlp.down_proj"}),
     ("1.mlp", {f"{layer}.mlp.{part}_proj" for layer in (1, 2) for part in ("up", "gate", "down")})],
)  # fmt: skip
def test_layers_that_move_take_along_what_is_not_quantised(skipped, plain, quantize, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    save_tiny("llama", tmp_path / "wide", dtype=torch.bfloat16, num_hidden_layers=3, intermediate_size=128)
    how = {"load_in_8bit": True} if quantize == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    settings = BitsAndBytesConfig(**how, llm_int8_skip_modules=["lm_head", f"model.layers.{skipped}"])
    options = {"dtype": torch.bfloat16, "device_map": "cpu"}
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "wide", quantization_config=settings, **options
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    step = {"use": "grow", "layers": 4, "placement": "interpolate"}
    done("apply", write_recipe(tmp_path / "grow.toml", "base", step, path=str(tmp_path / "out")))
    out = open_checkpoint(tmp_path / "out").packed
    floats = {name for name, spec in out.specs.items() if ".mlp." in name and spec.dtype == "BF16"}
    assert floats == {f"model.layers.{name}.weight" for name in plain}
    before, after = (
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / name, **options)) for name in ("base", "out")
    )
    assert torch.equal(before, after), "a new layer adds nothing"


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_a_plan_knows_how_copies_and_conversions_are_stored(folders, kind, dtype, tmp_path):
    """It sees their specs alone, and must come to the same files as the run, which sees what they are copies of."""
    base = open_checkpoint(folders("llama", kind))
    layer, moved, k_proj = (
        f"model.layers.{at}.self_attn.{part}_proj.weight" for at, part in ((2, "q"), (5, "k"), (0, "k"))
    )
    specs = {layer: base.specs[Q_PROJ], "draft.weight": base.specs[Q_PROJ]}
    edits = {name: Edit(replace(spec, name=name), Convert(Q_PROJ)) for name, spec in specs.items()}
    wide = {moved: Edit(replace(base.specs[k_proj], name=moved, dtype="F32"), Convert(moved))}
    wide[DOWN] = Edit(replace(base.specs[DOWN], dtype="F32"), Convert(DOWN))
    planned = ran = base
    for patch in (Patch(edits=edits, renames={moved: k_proj}), Patch(edits=wide)):
        planned, ran = promise(planned, Outline.of(patch), by="s"), overlay(ran, patch, by="s")
    outputs = []
    for uncast in (planned, ran):
        cast = uncast if dtype is None else overlay(uncast, cast_patch(uncast, dtype), by="output")
        outputs.append(repack(base, cast, uncast))
    plan, run = (output.checkpoint for output in outputs)
    assert list(plan.specs.items()) == list(run.specs.items())
    assert plan.shards == run.shards
    assert lay_out(plan, 30_000).files == lay_out(run, 30_000).files
    assert outputs[0].note == outputs[1].note
    assert run.specs["draft.weight"].dtype == ("F16" if dtype else base.specs[Q_PROJ].dtype)
    kept = open_checkpoint(materialise(run, tmp_path / "out"))
    for name, source in ((layer, Q_PROJ), (moved, k_proj), (DOWN, DOWN)):
        found, expected = kept.load(name).float(), base.load(source).float()
        assert (found - expected).norm() < 0.01 * expected.norm(), name  # scales of doubly quantised ones are rounded


def test_what_cannot_be_stored_like_the_base_is_refused(folders):
    import torch

    base = open_checkpoint(folders("llama", "nf4-bf16-storage"))
    odd = MemoryTensor(Q_PROJ, torch.zeros(1, 2).bfloat16())
    edits = {Q_PROJ: Edit(odd.spec, Value(odd))}
    with pytest.raises(Unsupported, match="do not fill whole items") as caught:
        repack(base, overlay(base, Patch(edits=edits), by="x"))
    assert 'quantize = "none"' in caught.value.remedy


def logits_of(model):
    import torch

    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # it wants a multiple of 32 rows, see core/verify/stock_load.py
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 18)[None], attention_mask=torch.ones(1, 16, dtype=torch.long)).logits


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [*(("llama", kind, DOWN) for kind in KINDS), ("qwen3", "nf4-double", "model.layers.1.self_attn.k_proj.weight"),
     ("qwen3", "int8", Q_PROJ), ("gpt2", "nf4", "transformer.h.0.attn.c_attn.weight")],
)  # fmt: skip
def test_stock_transformers_computes_with_the_new_weights(folders, family, kind, name, tmp_path):
    """Logits of the quantised output against those of the same weights dequantised, and not of the base's."""
    import torch
    from transformers import AutoModelForCausalLM

    base = open_checkpoint(folders(family, kind))
    kept = repack(base, merged(base, name, size=0.1)).checkpoint
    folder = materialise(kept, tmp_path / "kept")
    floats = materialise(open_checkpoint(folder), tmp_path / "floats")
    before = materialise(base, tmp_path / "before")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    ours = logits_of(model)
    expected, old = (logits_of(AutoModelForCausalLM.from_pretrained(each)) for each in (floats, before))
    error, moved = (ours - expected).norm(), (old - expected).norm()
    assert error < (0.3 if kind == "int8" else 0.1) * moved  # bfloat16 activations; int8 also quantises them
    assert torch.isfinite(ours).all()


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter", modules=("self_attn.q_proj", "self_attn.o_proj"))


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_apply_merges_into_a_quantised_base(folders, kind, adapter, tmp_path):
    step = {"use": "lora-merge", "adapter": str(adapter), "scale": 20.0}
    recipe = write_recipe(tmp_path / "r.toml", folders("llama", kind), ABF, step, path=str(tmp_path / "out"))
    assert "4 changed ones are quantised again" in done("plan", recipe).out
    ran = done("apply", recipe, "--json")
    lock = json.loads((tmp_path / "out" / "regraft.lock.json").read_text())
    measured = lock["output"]["quantised"]
    assert measured["realised_cosine"] > 0.9
    assert set(measured["realised_cosines"]) == {
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 1) for part in "qo"
    }
    assert any("cosine of the stored change" in note for note in ran.json["output_notes"])
    assert "## Quantised weights" in (tmp_path / "out" / "README.md").read_text()
    base, out = (open_checkpoint(folder).packed for folder in (folders("llama", kind), tmp_path / "out"))
    down = [name for name in base.tensors if name.startswith("model.layers.1.mlp.down_proj")]
    assert len(down) > 1
    for name in down:
        digest = lock["output"]["tensors"][name]["digest"]
        assert lock["base"]["tensors"][name] == digest
    done("verify", tmp_path / "out")
    again = write_recipe(tmp_path / "a.toml", folders("llama", kind), ABF, step, path=str(tmp_path / "again"))
    done("apply", again, "--threads", "1")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert out.config["quantization_config"] == base.config["quantization_config"]


def test_apply_refuses_a_lost_delta_and_each_remedy_helps(folders, adapter, tmp_path):
    step = {"use": "lora-merge", "adapter": str(adapter), "scale": 0.01}
    base, out = folders("llama", "nf4"), tmp_path / "out"
    recipe = write_recipe(tmp_path / "r.toml", base, step, path=str(out))
    ran = regraft("apply", recipe)
    assert ran.code == 1
    assert "loses the change of 4 of 4 weights" in ran.err
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))
    done("apply", recipe, "--set", "output.minimum_cosine=-1")
    done("apply", recipe, "--set", "output.quantize=none", "--force")
    assert "quantization_config" not in open_checkpoint(out).config
    nf4 = regraft("apply", recipe, "--set", "output.quantize=nf4", "--force")
    assert "loses the change" in nf4.err, "the form that the base has, asked for by name, is held to the same rule"


@pytest.mark.parametrize("dora", [False, True])
def test_a_saved_patch_of_values_that_a_quantised_base_rounds_is_warned_of(folders, dora, tmp_path):
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": (2, 64), f"{module}.lora_B.weight": (64, 2)}
    more = {f"{module}.lora_magnitude_vector": (64,)} if dora else {}
    adapter = write_adapter(tmp_path / "a", {**shapes, **more}, use_dora=dora)
    step = {"use": "lora-merge", "adapter": str(adapter)}
    target, made = {"path": str(tmp_path / "out"), "minimum_cosine": -1}, tmp_path / "patches"
    recipe = write_recipe(tmp_path / "r.toml", folders("llama", "nf4"), step, **target)
    ran = done("apply", recipe, "--save-patches", made)
    assert ("the saved patch holds rounded values" in ran.err) is dora
    again = {"use": "patch", "path": str(made / "lora-merge.regraft")}
    done("apply", write_recipe(tmp_path / "p.toml", folders("llama", "nf4"), again, **target), "--force", "-o",
         tmp_path / "again")  # fmt: skip
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert (one == two) is not dora


@pytest.mark.parametrize("source", ["safetensors", "gguf"])
def test_quantised_output_comes_after_any_step(folders, adapter, source, tmp_path):
    """An unquantised base or a GGUF file, two steps, nf4: what quantising the two steps' own output gives."""
    base = folders("llama", "nf4").parent / "llama"
    if source == "gguf":
        base = write_model(tmp_path / "base.gguf", tiny("llama", **WHOLE_BLOCKS["llama"]), "Q8_0")
    steps = (ABF, {"use": "lora-merge", "adapter": str(adapter)})
    done("apply", write_recipe(tmp_path / "a.toml", base, *steps, path=str(tmp_path / "floats")))
    done("apply", write_recipe(tmp_path / "b.toml", tmp_path / "floats", path=str(tmp_path / "two"), quantize="nf4"))
    done("apply", write_recipe(tmp_path / "c.toml", base, *steps, path=str(tmp_path / "one"), quantize="nf4"))
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_verify_computes_with_rows_that_bitsandbytes_cannot_pack(tmp_path):
    """On CPUs with AVX512-BF16 its own product fails for them; the checkpoint is as good as on any other machine."""
    base = save_tiny("llama", tmp_path / "base")
    recipe = write_recipe(tmp_path / "r.toml", base, path=str(tmp_path / "out"), quantize="nf4", verify="forward")
    assert done("apply", recipe, "--json").json["verified"] == "forward"
