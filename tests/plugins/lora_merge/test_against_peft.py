"""Every feature against `peft`'s own merge: the same bits where peft rounds once, one rounding apart elsewhere."""

import pytest
import torch

from regraft.core.sources.folder import open_folder
from tests.families import save_tiny
from tests.plugins.lora_merge.adapters import (
    edit_config,
    make_adapter,
    merged_by_peft,
    merged_by_us,
    roundings_apart,
    tensors_of,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(scope="module", params=DTYPES, ids=["bf16", "fp16", "fp32"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def llama(tmp_path_factory, dtype):
    return save_tiny("llama", tmp_path_factory.mktemp("llama"), dtype=dtype)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, dtype):
    return save_tiny("gpt2-untied", tmp_path_factory.mktemp("gpt2"), dtype=dtype)


def check_equal(base, adapter, changed, **params):
    ours, theirs = tensors_of(merged_by_us(base, adapter, **params)), merged_by_peft(base, adapter)
    different = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert set(ours) == set(theirs)
    assert not different
    assert changed_names(base, ours) == changed


def changed_names(base, ours):
    before = tensors_of(open_folder(base, label="base"))
    return {name for name in ours if name not in before or not torch.equal(ours[name], before[name])}


def of_layers(*names):
    return {f"model.layers.{layer}.{name}" for layer in range(2) for name in names}


def test_embeddings(llama, dtype, tmp_path):
    """peft rounds the delta of an embedding before it adds it."""
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["embed_tokens", "lm_head", "q_proj"])
    ours, theirs = tensors_of(merged_by_us(llama, adapter)), merged_by_peft(llama, adapter)
    assert roundings_apart(ours, theirs) <= (0.0 if dtype == torch.float32 else 1.0)
    assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])
    expected = {"model.embed_tokens.weight", "lm_head.weight"} | of_layers("self_attn.q_proj.weight")
    assert changed_names(llama, ours) == expected


def test_rank_stabilised_with_patterns(llama, tmp_path):
    """A pattern fits a whole tail of the path; the first that fits counts."""
    adapter = make_adapter(
        llama,
        tmp_path / "a",
        target_modules=["q_proj", "k_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 8, "q_proj": 2, "proj": 16, "^model.layers.1.mlp.down_proj": 3},
        alpha_pattern={r".*k_proj": 32, "layers.1.self_attn.k_proj": 1, "model.layers.0.mlp.down_proj": 0.5},
    )
    stored = open_adapter_shapes(adapter)
    assert stored["model.layers.0.self_attn.q_proj"] == 8
    assert stored["model.layers.1.self_attn.q_proj"] == 2
    assert stored["model.layers.1.mlp.down_proj"] == 3
    assert stored["model.layers.0.self_attn.k_proj"] == 4, "`proj` is no whole segment of the path"
    check_equal(llama, adapter, of_layers("self_attn.q_proj.weight", "self_attn.k_proj.weight", "mlp.down_proj.weight"))


def open_adapter_shapes(adapter):
    from regraft.plugins.lora_merge.adapter import open_adapter

    return {module.path: module.tensors["lora_A"].spec.rows for module in open_adapter(adapter).modules}


def test_layers_to_transform(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["q_proj", "o_proj"], layers_to_transform=[1])
    check_equal(llama, adapter, {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"})


def test_excluded_modules_and_a_regular_expression(llama, tmp_path):
    adapter = make_adapter(
        llama, tmp_path / "a", target_modules=r".*\.mlp\.(up|down)_proj", exclude_modules=["1.mlp.up_proj"]
    )
    expected = of_layers("mlp.down_proj.weight") | {"model.layers.0.mlp.up_proj.weight"}
    check_equal(llama, adapter, expected)


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision(llama, factors, tmp_path):
    """peft loads them as fp32 and rounds once."""
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["v_proj"], dtype=factors)
    check_equal(llama, adapter, of_layers("self_attn.v_proj.weight"))


def test_conv1d_whatever_the_flag_says(gpt2, tmp_path):
    """GPT-2 stores (in, out); peft goes by the layer, and saves whichever flag it saw last. c_proj is square."""
    adapter = make_adapter(gpt2, tmp_path / "a", target_modules=["c_attn", "c_proj", "lm_head"], fan_in_fan_out=True)
    names = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_proj.weight")
    expected = {f"transformer.h.{layer}.{name}" for layer in range(2) for name in names} | {"lm_head.weight"}
    check_equal(gpt2, adapter, expected)
    check_equal(gpt2, edit_config(adapter, fan_in_fan_out=False), expected)


def test_trained_biases(gpt2, tmp_path):
    own = make_adapter(gpt2, tmp_path / "own", target_modules=["c_attn"], bias="lora_only")
    adapted = {f"transformer.h.{layer}.attn.c_attn.{leaf}" for layer in range(2) for leaf in ("weight", "bias")}
    check_equal(gpt2, own, adapted)
    every = make_adapter(gpt2, tmp_path / "all", target_modules=["c_attn"], bias="all")
    biases = {name for name in open_folder(gpt2, label="base").specs if name.endswith(".bias")}
    check_equal(gpt2, every, adapted | biases)


def test_bias_of_the_factor(gpt2, tmp_path):
    adapter = make_adapter(gpt2, tmp_path / "a", target_modules=["c_attn"], lora_bias=True)
    check_equal(
        gpt2,
        adapter,
        {f"transformer.h.{layer}.attn.c_attn.{leaf}" for layer in range(2) for leaf in ("weight", "bias")},
    )


def test_modules_to_save(llama, dtype, tmp_path):
    adapter = make_adapter(
        llama, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm", "up_proj"]
    )
    expected = of_layers("self_attn.q_proj.weight", "mlp.up_proj.weight") | {"lm_head.weight", "model.norm.weight"}
    check_equal(llama, adapter, expected)


def test_modules_to_save_in_another_dtype_are_rounded_to_the_base(tmp_path):
    base = save_tiny("llama", tmp_path / "base", dtype=torch.float32)
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj"], modules_to_save=["lm_head"])
    half = save_tiny("llama", tmp_path / "half", dtype=torch.bfloat16)
    merged = merged_by_us(half, adapter)
    assert merged.specs["lm_head.weight"].dtype == "BF16"
    assert torch.equal(merged.load("lm_head.weight"), merged_by_us(base, adapter).load("lm_head.weight").bfloat16())


@pytest.mark.parametrize("rslora", [False, True])
def test_dora(llama, dtype, rslora, tmp_path):
    adapter = make_adapter(
        llama, tmp_path / "a", target_modules=["q_proj", "down_proj"], use_dora=True, use_rslora=rslora
    )
    ours, theirs = tensors_of(merged_by_us(llama, adapter)), merged_by_peft(llama, adapter)
    assert roundings_apart(ours, theirs) <= (4.0 if dtype == torch.float32 else 1.0)
    assert changed_names(llama, ours) == of_layers("self_attn.q_proj.weight", "mlp.down_proj.weight")


def test_dora_by_column(gpt2, dtype, tmp_path):
    """Outputs are the columns of Conv1D and of embeddings."""
    adapter = make_adapter(gpt2, tmp_path / "a", target_modules=["c_attn", "c_fc", "wte"], use_dora=True)
    ours, theirs = tensors_of(merged_by_us(gpt2, adapter)), merged_by_peft(gpt2, adapter)
    assert roundings_apart(ours, theirs) <= (4.0 if dtype == torch.float32 else 1.0)
    assert "transformer.wte.weight" in changed_names(gpt2, ours)


def test_dora_of_embeddings_whose_copy_the_adapter_keeps(llama, dtype, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["embed_tokens", "q_proj"], use_dora=True)
    ours, theirs = tensors_of(merged_by_us(llama, adapter)), merged_by_peft(llama, adapter)
    assert roundings_apart(ours, theirs) <= (4.0 if dtype == torch.float32 else 1.0)


def test_several_adapters_are_several_steps(llama, tmp_path):
    first = make_adapter(llama, tmp_path / "a", target_modules=["q_proj", "k_proj"], seed=1)
    second = make_adapter(llama, tmp_path / "b", target_modules=["q_proj"], seed=2, r=2)
    ours, theirs = tensors_of(merged_by_us(merged_by_us(llama, first), second)), merged_by_peft(llama, first, second)
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_scale_multiplies_alpha(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["q_proj"], lora_alpha=8)
    scaled = tensors_of(merged_by_us(llama, adapter, scale=0.25))
    expected = merged_by_peft(llama, edit_config(adapter, lora_alpha=2))
    assert all(torch.equal(scaled[name], expected[name]) for name in expected)


def test_scale_zero_changes_nothing(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "a", target_modules=["q_proj"])
    assert changed_names(llama, tensors_of(merged_by_us(llama, adapter, scale=0.0))) == set()


def test_an_adapter_name_in_the_tensor_names(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(llama, tmp_path / "a", target_modules=["q_proj"])
    expected = tensors_of(merged_by_us(llama, adapter))
    file = adapter / "adapter_model.safetensors"
    named = {name.replace(".weight", ".style.weight"): tensor for name, tensor in load_file(file).items()}
    save_file(named, file)
    ours = tensors_of(merged_by_us(llama, adapter))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_base_stored_without_its_prefix(gpt2, tmp_path):
    """The tensors of the original GPT-2 release have no `transformer.` before their names."""
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(gpt2, tmp_path / "a", target_modules=["c_attn"])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    tensors = load_file(gpt2 / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}, bare / "model.safetensors"
    )
    ours, expected = tensors_of(merged_by_us(bare, adapter)), tensors_of(merged_by_us(gpt2, adapter))
    assert {f"transformer.{name}" for name in ours if name != "lm_head.weight"} == set(expected) - {"lm_head.weight"}
    assert torch.equal(ours["h.1.attn.c_attn.weight"], expected["transformer.h.1.attn.c_attn.weight"])
