"""bitsandbytes checkpoints: shown dequantised, equal to what transformers makes of them, refused when they lie."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regraft.core.dequantised import FourBitTensor
from regraft.core.errors import InputError
from regraft.core.fourbit import TABLES, State, parse_state
from regraft.core.sources.bitsandbytes import dequantise
from regraft.core.sources.folder import open_folder
from regraft.core.sources.open import dequantised
from regraft.core.specs import TensorSpec
from regraft.core.tensors import LazyTensor, MemoryTensor
from tests.families import save_tiny

pytestmark = [
    # torch's own compiler, imported by bitsandbytes, still uses what torch deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-bf16-storage": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
LAYER = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def quantise(source: Path, target: Path, **settings):
    """What transformers writes for `source` when bitsandbytes quantises it on loading."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of a tiny llama whose rows are whole blocks, by (kind, dtype name); made when first asked for."""
    import torch

    root = tmp_path_factory.mktemp("quantised")

    def folder(kind: str, dtype: str) -> Path:
        base, target = root / f"base-{dtype}", root / f"{kind}-{dtype}"
        if not base.exists():
            save_tiny("llama", base, dtype=getattr(torch, dtype), intermediate_size=128)
        return target if target.exists() else quantise(base, target, **KINDS[kind])

    return folder


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of a quantised folder in which tensors (or the config) are changed."""
    from safetensors.torch import load_file, save_file

    def make(kind: str, change) -> Path:
        source = folders(kind, "float32")
        tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
        change(tensors, config)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_those_that_transformers_dequantises(folders, kind, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    folder = folders(kind, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder).dequantize(dtype=getattr(torch, dtype))
    shown = dequantise(open_folder(folder, label="base"))
    expected = model.state_dict()
    assert set(shown.tensors) == set(expected)
    for name, tensor in expected.items():
        loaded = shown.load(name)
        assert loaded.dtype == tensor.dtype, name
        assert torch.equal(loaded, tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_shown_checkpoint_says_nothing_of_quantisation_but_in_its_notes(folders, kind):
    plain, quantised = (
        open_folder(folders(kind, "bfloat16").parent / "base-bfloat16", label="x"),
        folders(kind, "bfloat16"),
    )
    shown = dequantise(open_folder(quantised, label="x"))
    assert dict(shown.specs) == dict(plain.specs)
    assert "quantization_config" not in shown.config
    assert shown.config["dtype"] == "bfloat16"
    assert set(shown.shards) == set(shown.tensors)
    assert kind.split("-")[0] in shown.origin["quantization"]
    assert "14 weights" in shown.notes[0]
    assert "bfloat16" in shown.notes[0]


def test_the_common_door_dequantises(folders):
    shown = dequantised(open_folder(folders("nf4", "float32"), label="base"))
    assert shown.specs[f"{LAYER}.weight"].dtype == "F32"
    assert dequantised(shown) is shown


def test_opening_needs_neither_torch_nor_bitsandbytes(folders):
    code = (
        "import sys; from pathlib import Path\n"
        "from regraft.core.sources.folder import open_folder\n"
        "from regraft.core.sources.open import dequantised\n"
        "for folder in sys.argv[1:]: dequantised(open_folder(Path(folder), label=folder)).specs\n"
        "print(sorted({'torch', 'bitsandbytes', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *(str(folders(kind, "float32")) for kind in KINDS)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_8_bit_without_a_dtype_in_the_config_is_shown_in_float16(damaged):
    def forget(tensors, config):
        del config["dtype"]

    shown = dequantise(open_folder(damaged("int8", forget), label="base"))
    assert shown.specs[f"{LAYER}.weight"].dtype == "F16"


def test_a_config_of_an_old_transformers_names_no_method(damaged):
    def forget(tensors, config):
        del config["quantization_config"]["quant_method"]

    assert dequantise(open_folder(damaged("nf4", forget), label="base")).specs[f"{LAYER}.weight"].dtype == "F32"


@pytest.mark.parametrize("settings", [KINDS["nf4"], KINDS["int8"]], ids=["nf4", "int8"])
def test_gpt2_is_shown_the_way_round_that_its_class_expects(settings, tmp_path):
    """The linear layers of its blocks are stored transposed, its head is not."""
    import torch
    from transformers import AutoModelForCausalLM

    base = open_folder(save_tiny("gpt2-untied", tmp_path / "base", n_inner=128), label="base")
    folder = quantise(tmp_path / "base", tmp_path / "quantised", **settings, llm_int8_skip_modules=["nothing"])
    shown = dequantise(open_folder(folder, label="quantised"))
    assert dict(shown.specs) == dict(base.specs)
    expected = AutoModelForCausalLM.from_pretrained(folder).dequantize(dtype=torch.float32).state_dict()
    for name in base.tensors:
        linear = ".c_" in name and name.endswith("weight")
        assert torch.equal(shown.load(name), expected[name].t() if linear else expected[name]), name
    assert "9 weights" in shown.notes[0]
    square = "transformer.h.0.attn.c_proj.weight"
    assert (shown.load(square) - base.load(square)).norm() < 0.15 * base.load(square).norm()


def flat_reference(codes, absmax, table, block_size, shape):
    """Dequantised one code at a time."""
    nibbles = [half for byte in codes.view(-1).tolist() for half in (byte >> 4, byte & 15)]
    count = int(np.prod(shape))
    values = [np.float32(table[nibbles[i]]) * np.float32(absmax[i // block_size]) for i in range(count)]
    return np.array(values, np.float32).reshape(shape)


@pytest.mark.parametrize("shape", [(33, 100), (7, 37), (64, 160), (3, 300), (1, 1), (200,)], ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_blocks_that_cross_rows(shape, quant_type, block_size):
    """bitsandbytes' own CPU kernel gets these wrong with AVX512, so the definition is the reference."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    codes, state = quantize_4bit(weight, blocksize=block_size, quant_type=quant_type)
    tensor = FourBitTensor(
        TensorSpec("w", "F32", shape),
        State(quant_type, block_size, "F32", shape),
        MemoryTensor("w", codes),
        MemoryTensor("w.absmax", state.absmax),
    )
    expected = torch.from_numpy(flat_reference(codes, state.absmax.tolist(), TABLES[quant_type], block_size, shape))
    assert torch.equal(tensor.load(), expected)
    read = tensor.open()
    for start, stop in [(0, 1), (shape[0] // 2, shape[0]), (shape[0] - 1, shape[0])]:
        assert torch.equal(read(start, stop), expected[start:stop])


def test_tables_are_those_of_bitsandbytes():
    from bitsandbytes.functional import get_4bit_type

    for quant_type, table in TABLES.items():
        assert np.array_equal(np.array(table, np.float32), get_4bit_type(quant_type, device="cpu").numpy())


def test_rows_read_only_their_own_bytes(folders):
    shown = dequantise(open_folder(folders("nf4", "float32"), label="base"))
    whole = shown.tensor(f"{DOWN}.weight")
    assert isinstance(whole, FourBitTensor)
    codes, scales = Recorder(whole.codes), Recorder(whole.scales)
    watched = FourBitTensor(whole.spec, whole.state, codes, scales)
    assert watched.row_local
    assert watched.open()(10, 12).equal(whole.load()[10:12])
    assert codes.ranges == [(10 * 64, 12 * 64)]
    assert scales.ranges == [(20, 24)]


class Recorder(LazyTensor):
    """Notes which rows of a tensor are read."""

    def __init__(self, tensor):
        self.spec, self.tensor, self.ranges = tensor.spec, tensor, []

    def open(self, device="cpu"):
        read = self.tensor.open(device)

        def recorded(start, stop):
            self.ranges.append((start, stop))
            return read(start, stop)

        return recorded


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", None])
def test_other_methods_are_refused_by_name(damaged, method):
    def change(tensors, config):
        config["quantization_config"] = {"bits": 4} if method is None else {"quant_method": method}

    with pytest.raises(InputError, match=str(method)) as caught:
        dequantise(open_folder(damaged("nf4", change), label="base"))
    assert "config.json" in str(caught.value.where)
    assert "unquantised" in str(caught.value.remedy)


def without(name):
    return lambda tensors, config: tensors.pop(name)


def shortened(name):
    def change(tensors, config):
        tensors[name] = tensors[name][:-1].clone()

    return change


def retyped(name, dtype):
    def change(tensors, config):
        import torch

        tensors[name] = tensors[name].to(getattr(torch, dtype))

    return change


def state(text=None, **values):
    """Other text, or other values, in a quantisation state."""

    def change(tensors, config):
        import torch

        name = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
        document = {**json.loads(bytes(tensors[name].numpy())), **values}
        data = json.dumps(document).encode() if text is None else text
        tensors[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    return change


def renamed(old, new):
    def change(tensors, config):
        tensors[new] = tensors.pop(old)

    return change


def nothing_but_codes(tensors, config):
    for name in [name for name in tensors if name.startswith(LAYER) and name != f"{LAYER}.weight"]:
        del tensors[name]


def vector(tensors, config):
    tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].view(-1)


def list_for_config(tensors, config):
    config["quantization_config"] = ["bitsandbytes"]


def unordered_rows(tensors, config):
    tensors[f"{LAYER}.weight_format"].fill_(2)


def dtype_of_codes(tensors, config):
    config["dtype"] = "int4"


MALFORMED = {
    "no scales": ("nf4", without(f"{LAYER}.weight.absmax"), "weight.absmax"),
    "no map": ("nf4", without(f"{LAYER}.weight.quant_map"), "weight.quant_map"),
    "no state": ("nf4", without(f"{LAYER}.weight.quant_state.bitsandbytes__nf4"), "quant_state.bitsandbytes__nf4"),
    "no weight": ("nf4", without(f"{LAYER}.weight"), f"{LAYER}.weight"),
    "no nested map": ("nf4-double", without(f"{LAYER}.weight.nested_quant_map"), "weight.nested_quant_map"),
    "no nested scales": ("nf4-double", without(f"{LAYER}.weight.nested_absmax"), "weight.absmax"),
    "codes alone": ("nf4", nothing_but_codes, "quant_state.bitsandbytes__nf4"),
    "codes in one dimension": ("nf4", vector, f"{LAYER}.weight"),
    "config is no object": ("nf4", list_for_config, "quantization_config"),
    "codes too short": ("nf4", shortened(f"{LAYER}.weight"), f"{LAYER}.weight"),
    "scales too short": ("nf4", shortened(f"{LAYER}.weight.absmax"), "weight.absmax"),
    "scales in another dtype": ("nf4", retyped(f"{LAYER}.weight.absmax", "bfloat16"), "weight.absmax"),
    "state is no JSON": ("nf4", state(text=b"{'quant_type': nf4}"), "quant_state.bitsandbytes__nf4"),
    "state is no object": ("nf4", state(text=b"[4]"), "quant_state.bitsandbytes__nf4"),
    "state is no text": ("nf4", state(text=b"\xff\xfe"), "quant_state.bitsandbytes__nf4"),
    "state is huge": ("nf4", state(text=b" " * 5000), "quant_state.bitsandbytes__nf4"),
    "state of another shape": ("nf4", state(shape=[64, 65]), f"{LAYER}.weight"),
    "state without a shape": ("nf4", state(shape=None), "shape"),
    "state with a negative size": ("nf4", state(shape=[-64, -64]), "shape"),
    "state of an odd block": ("nf4", state(blocksize=48), "blocksize"),
    "state of another block": ("nf4", state(blocksize=128), "weight.absmax"),
    "state of another type": ("nf4", state(quant_type="fp4"), "quant_state.bitsandbytes__nf4"),
    "state of an unknown type": ("nf4", state(quant_type="af4"), "quant_type"),
    "state of an integer dtype": ("nf4", state(dtype="int8"), "dtype"),
    "nested state without offset": ("nf4-double", state(nested_offset=None), "nested_offset"),
    "nested state of another block": ("nf4-double", state(nested_blocksize=32), "weight.nested_absmax"),
    "nested state of half precision": ("nf4-double", state(nested_dtype="float16"), "nested_dtype"),
    "no row scales": ("int8", without(f"{LAYER}.SCB"), f"{LAYER}.SCB"),
    "8-bit codes alone": ("int8", nothing_but_codes, f"{LAYER}.SCB"),
    "8-bit codes in one dimension": ("int8", vector, f"{LAYER}.weight"),
    "row scales too short": ("int8", shortened(f"{LAYER}.SCB"), f"{LAYER}.SCB"),
    "row scales of nothing": ("int8", renamed(f"{LAYER}.weight", f"{LAYER}.wait"), f"{LAYER}.weight"),
    "rows in another order": ("int8", unordered_rows, "weight_format"),
    "codes in another dtype": ("int8", retyped(f"{LAYER}.weight", "float16"), f"{LAYER}.weight"),
    "no such dtype": ("int8", dtype_of_codes, "config.json: dtype"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_weight_is_refused(damaged, fault):
    kind, change, where = MALFORMED[fault]
    with pytest.raises(InputError) as caught:
        dequantise(open_folder(damaged(kind, change), label="base"))
    error = caught.value
    assert where in str(error.where)
    assert error.remedy
    assert error.found


def test_a_state_written_by_regraft_is_read_back():
    written = State("nf4", 64, "BF16", (96, 64))
    assert parse_state(written.dump(), "w", nested=False) == written
    with pytest.raises(InputError, match="nested_blocksize"):
        parse_state(written.dump(), "w", nested=True)
    assert parse_state(replace(written, dtype="F16").dump(), "w", nested=False).dtype == "F16"
