"""Vectors from a file: where they go, how strong, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from regraft.core.errors import InputError, RegraftError, Unsupported, UsageError
from regraft.core.patch import Patch
from regraft.core.residual_bias import HeadOffset, Offset, ResidualBias
from regraft.core.tensors import MemoryTensor
from regraft.core.transformation import Run
from regraft.plugins.steer import Steer
from regraft.plugins.steer.params import SteerParams
from regraft.plugins.steer.vectors import read_vectors, suggest
from tests.core.residual.support import hook, load, logits, open_base, written
from tests.families import save_tiny


def random(size: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed))).to(dtype)


def vectors_of(architecture: Any) -> dict[str, torch.Tensor]:
    hidden, size = architecture.hidden_size, architecture.head_dim
    return {
        "layers.0.attn_out": random(hidden, 0),
        "layers.1.mlp_out": random(hidden, 1, torch.float16),
        "layers.1.heads.3": random(size, 2, torch.bfloat16),
        "layers.1.heads.0": random(size, 3, torch.float64),
    }


def steer(base: Path, vectors: Path, **values: Any) -> Patch:
    """Check, plan and apply, as a recipe does."""
    checkpoint, _ = open_base(base)
    step, given = Steer(), SteerParams.model_validate({"vectors": vectors, **values}, strict=True)
    step.check(checkpoint, given)
    patch = step.apply(checkpoint, given, Run("steer"))
    assert step.plan(checkpoint, given).deviations(patch) == []
    return patch


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "falcon"])
def test_a_steered_checkpoint_computes_what_hooks_add(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    checkpoint, architecture = open_base(base)
    vectors = vectors_of(architecture)
    save_file(vectors, tmp_path / "vectors.safetensors")
    patch = steer(base, tmp_path / "vectors.safetensors", strength=-1.5)
    offsets: list[Offset] = [
        ResidualBias(0, "attn_out", MemoryTensor("a", vectors["layers.0.attn_out"]), -1.5),
        ResidualBias(1, "mlp_out", MemoryTensor("b", vectors["layers.1.mlp_out"]), -1.5),
        HeadOffset(1, 3, MemoryTensor("c", vectors["layers.1.heads.3"]), scale=-1.5),
        HeadOffset(1, 0, MemoryTensor("d", vectors["layers.1.heads.0"]), scale=-1.5),
    ]
    plain = logits(load(base))
    hooked = logits(hook(load(base), architecture, offsets))
    after = logits(load(written(checkpoint, patch, tmp_path / "steered")))
    assert (hooked - plain).abs().max() >= 0.5
    assert (after - hooked).abs().max() <= 1e-5
    assert patch.metrics == {"vectors": 4}


def test_notes_say_which_way_each_layer_took(tmp_path: Path) -> None:
    vectors = {f"layers.{layer}.attn_out": random(64, layer) for layer in (0, 1, 3)}
    save_file({**vectors, "layers.2.mlp_out": random(64, 5)}, tmp_path / "v.safetensors")
    llama = steer(save_tiny("llama", tmp_path / "llama", num_hidden_layers=4), tmp_path / "v.safetensors")
    assert llama.notes[:4] == (
        "4 vectors of v.safetensors added",
        "layer 2, MLP output: switch mlp_bias",
        "layers 0-1, 3, attention output: switch attention_bias",
        "besides: 24 biases of zeros, because the config adds them",
    )
    gpt2 = steer(save_tiny("gpt2", tmp_path / "gpt2", n_layer=4), tmp_path / "v.safetensors", strength=2.0)
    assert gpt2.notes == (
        "4 vectors of v.safetensors added, times 2",
        "layer 2, MLP output: in place",
        "layers 0-1, 3, attention output: in place",
    )
    qwen2 = steer(save_tiny("qwen2", tmp_path / "qwen2", num_hidden_layers=4), tmp_path / "v.safetensors")
    assert "layers 0-1, 3, attention output: re-expressed as llama" in qwen2.notes
    with pytest.raises(Unsupported, match="keep-class"):
        steer(tmp_path / "qwen2", tmp_path / "v.safetensors", mode="keep-class")


def test_key_value_groups_keep_the_class(tmp_path: Path) -> None:
    save_file({"layers.0.kv_groups.1": random(16, 0)}, tmp_path / "v.safetensors")
    patch = steer(save_tiny("qwen2", tmp_path / "base"), tmp_path / "v.safetensors", mode="keep-class")
    assert set(patch.edits) == {"model.layers.0.self_attn.v_proj.bias"}
    assert not patch.json


def bad(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: value}


NAN = torch.zeros(64)
NAN[3], NAN[5:7] = float("nan"), float("inf")
BAD: dict[str, tuple[dict[str, torch.Tensor], type[RegraftError], str, str]] = {
    "no layer 2": (bad("layers.2.attn_out", torch.ones(64)), UsageError, "there is no layer 2", "layers.2.attn_out"),
    "no head 4": (bad("layers.0.heads.4", torch.ones(16)), UsageError, "there is no head 4", "layers.0.heads.4"),
    "no group 2": (bad("layers.0.kv_groups.2", torch.ones(16)), UsageError, "key-value head 2", "kv_groups.2"),
    "wrong size": (bad("layers.0.mlp_out", torch.ones(63)), InputError, "another shape", "layers.0.mlp_out"),
    "two dimensions": (bad("layers.0.mlp_out", torch.ones(1, 64)), InputError, "another shape", "layers.0.mlp_out"),
    "a scalar": (bad("layers.0.mlp_out", torch.tensor(1.0)), InputError, "another shape", "layers.0.mlp_out"),
    "whole numbers": (bad("layers.0.mlp_out", torch.ones(64).int()), InputError, "float tensor", "layers.0.mlp_out"),
    "nan": (bad("layers.0.attn_out", NAN), InputError, "1 NaN, 2 Inf", "layers.0.attn_out"),
    "nan in bf16": (bad("layers.0.attn_out", NAN.bfloat16()), InputError, "1 NaN, 2 Inf", "layers.0.attn_out"),
    "nan in f16": (bad("layers.0.attn_out", NAN.half()), InputError, "1 NaN, 2 Inf", "layers.0.attn_out"),
    "a typing error": (
        {"layers.0.attn_out": torch.ones(64), "layer.11.atn_out": torch.ones(64)},
        InputError,
        'did you mean "layers.11.attn_out"',
        "layer.11.atn_out",
    ),
    "a leading zero": (bad("layers.01.attn_out", torch.ones(64)), InputError, 'mean "layers.1.attn_out"', "layers.01"),
    "no such place": (bad("weight", torch.ones(64)), InputError, "says no place", "weight"),
    "nothing": ({}, InputError, "no vectors", "vectors.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_vectors(case: str, tmp_path: Path) -> None:
    tensors, kind, words, where = BAD[case]
    save_file(tensors, tmp_path / "vectors.safetensors")
    with pytest.raises(kind) as caught:
        steer(save_tiny("llama", tmp_path / "base"), tmp_path / "vectors.safetensors")
    assert words in str(caught.value)
    assert where in str(caught.value.where)
    assert "vectors.safetensors" in str(caught.value.where)
    assert caught.value.expected
    assert caught.value.remedy


def test_no_file_and_no_safetensors_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_vectors(tmp_path / "none.safetensors", 1.0)
    (tmp_path / "v.pt").write_bytes(b"PK\x03\x04" + bytes(64))
    with pytest.raises(InputError) as caught:
        read_vectors(tmp_path / "v.pt", 1.0)
    assert "v.pt" in str(caught.value)


@pytest.mark.parametrize(
    "values", [{"strength": float("nan")}, {"strength": "2"}, {"mode": "sidecar"}, {"vector": "v"}]
)
def test_bad_parameters(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SteerParams.model_validate({"vectors": Path("v"), **values}, strict=True)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("layers.3.attn_ouput", 'did you mean "layers.3.attn_out"?'),
        ("model.layers.3.heads.12", 'did you mean "layers.3.heads.12"?'),
        ("layers.3.head.12", 'did you mean "layers.3.heads.12"?'),
        ("lm_head.weight", None),
    ],
)
def test_suggestions(name: str, meant: str | None) -> None:
    assert suggest(name) == meant


def test_by_a_recipe(tmp_path: Path) -> None:
    base = save_tiny("qwen2", tmp_path / "base", tokenizer=True)
    _, architecture = open_base(base)
    vectors = vectors_of(architecture)
    save_file(vectors, tmp_path / "v.safetensors")
    recipe = {
        "schema": "schema = 1",
        "name": 'name = "steered"',
        "base": '[base]\nmodel = "base"',
        "steps": '[[steps]]\nuse = "steer"\nvectors = "v.safetensors"\nstrength = -1.0',
        "output": '[output]\npath = "out"',
    }
    (tmp_path / "recipe.toml").write_text("\n".join(recipe.values()) + "\n")
    for command in (["plan"], ["apply", "--verify", "load"]):
        arguments = [sys.executable, "-m", "regraft", command[0], "recipe.toml", *command[1:]]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    lock = json.loads((tmp_path / "out" / "regraft.lock.json").read_text())
    assert "re-expressed as llama" in json.dumps(lock)
    offsets: list[Offset] = [
        ResidualBias(0, "attn_out", MemoryTensor("a", vectors["layers.0.attn_out"]), -1.0),
        ResidualBias(1, "mlp_out", MemoryTensor("b", vectors["layers.1.mlp_out"]), -1.0),
        HeadOffset(1, 3, MemoryTensor("c", vectors["layers.1.heads.3"]), scale=-1.0),
        HeadOffset(1, 0, MemoryTensor("d", vectors["layers.1.heads.0"]), scale=-1.0),
    ]
    hooked = logits(hook(load(base), architecture, offsets))
    assert (logits(load(tmp_path / "out")) - hooked).abs().max() <= 1e-5
