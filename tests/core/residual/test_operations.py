"""The operations by themselves: closed forms, pieces, saving, and the errors of the primitives."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from regraft.core.errors import InputError, RegraftError, Unsupported, UsageError
from regraft.core.residual_bias import HeadOffset, HeadScale, ResidualBias, bake_head_scales, bake_residual_biases
from regraft.core.residual_operations import BiasUpdate, Projection, ScaleColumns, Term
from regraft.core.tensors import MemoryTensor
from tests.core.residual.support import open_base, vector
from tests.families import save_tiny


def tensor(values: torch.Tensor, name: str = "t") -> MemoryTensor:
    return MemoryTensor(name, values)


def test_a_bias_takes_up_vectors_where_they_belong() -> None:
    terms = (Term(tensor(torch.ones(4)), start=2, scale=3.0), Term(tensor(torch.arange(6.0))))
    update = BiasUpdate(terms, "bias").prepare("cpu")
    bias = torch.full((6,), 10.0)
    expected = torch.tensor([10.0, 11, 15, 16, 17, 18])
    assert (update(0, 6, bias) == expected).all()
    assert (bias == 10).all()
    pieces = [update(start, start + 2, bias[start : start + 2]) for start in (0, 2, 4)]
    assert (torch.cat(pieces) == expected).all()
    assert (BiasUpdate(terms).prepare("cpu")(1, 4) == torch.tensor([1.0, 5, 6])).all()


def test_a_double_bias_is_not_changed_in_place() -> None:
    bias = torch.ones(3, dtype=torch.float64)
    BiasUpdate((Term(tensor(torch.ones(3))),), "bias").prepare("cpu")(0, 3, bias)
    assert (bias == 1).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 70_001])
def test_a_projection_of_offsets(transposed: bool, rows: int) -> None:
    """70 001 rows of 12 fp32 inputs are more than three pieces."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, 12, generator=generator)
    one, two = torch.randn(4, generator=generator), torch.randn(3, generator=generator)
    terms = (Term(tensor(one), 0), Term(tensor(two), 9, -2.0))
    stored = weight.T.contiguous() if transposed else weight
    result = Projection(tensor(stored, "w"), terms, transposed=transposed)
    assert result.spec.shape == (rows,)
    expected = weight[:, :4].double() @ one.double() - 2 * (weight[:, 9:].double() @ two.double())
    assert (result.load() - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("transposed", [False, True])
def test_scaled_columns(transposed: bool) -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    operation = ScaleColumns("w", (Term(tensor(torch.tensor([1.0, -1.0])), 4, 0.5),), 8, transposed)
    stored = weight.T if transposed else weight
    scale = operation.prepare("cpu")
    whole = scale(0, len(stored), stored)
    pieces = torch.cat([scale(row, row + 1, stored[row : row + 1]) for row in range(len(stored))])
    assert (whole == pieces).all()
    factors = torch.tensor([1, 1, 1, 1, 1.5, 0.5, 1, 1])
    assert ((whole.T if transposed else whole) == weight * factors).all()


def test_operations_survive_being_saved() -> None:
    vectors = {"0": tensor(torch.ones(2)), "1": tensor(torch.arange(3.0))}
    terms = (Term(vectors["0"], 1, 2.0), Term(vectors["1"], 3))
    for operation in (BiasUpdate(terms, "b"), BiasUpdate(terms), ScaleColumns("w", terms, 8, True)):
        parameters = json.loads(json.dumps(operation.parameters))
        assert dict(operation.operands) == vectors
        assert type(operation).restore(operation.inputs, parameters, vectors) == operation


BAD: list[tuple[object, type[RegraftError], str]] = [
    (ResidualBias(2, "attn_out", vector(64, "v")), UsageError, "there is no layer 2"),
    (ResidualBias(-1, "mlp_out", vector(64, "v")), UsageError, "there is no layer -1"),
    (HeadOffset(0, 4, vector(16, "v")), UsageError, "there is no head 4"),
    (HeadOffset(0, 2, vector(16, "v"), site="kv-group"), UsageError, "there is no key-value head 2"),
    (ResidualBias(0, "attn_out", vector(63, "v")), InputError, "another shape"),
    (HeadOffset(0, 0, vector(64, "v")), InputError, "another shape"),
    (ResidualBias(0, "attn_out", tensor(torch.zeros(64, dtype=torch.int64), "v")), InputError, "dtype"),
]


@pytest.mark.parametrize(("offset", "kind", "words"), BAD)
def test_what_does_not_fit_the_model(offset, kind: type[RegraftError], words: str, tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("llama", tmp_path))
    with pytest.raises(kind, match=words) as caught:
        bake_residual_biases(checkpoint, architecture, [offset])
    assert caught.value.where == "v"
    assert caught.value.expected
    assert caught.value.remedy


def test_scales_that_do_not_fit(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("llama", tmp_path))
    for scale, words in (
        (HeadScale(0, 4, vector(16)), "there is no head 4"),
        (HeadScale(3, 0, vector(16)), "there is no layer 3"),
    ):
        with pytest.raises(UsageError, match=words):
            bake_head_scales(checkpoint, architecture, [scale])
    with pytest.raises(InputError, match="another shape"):
        bake_head_scales(checkpoint, architecture, [HeadScale(0, 0, vector(64))])
    with pytest.raises(UsageError, match="scaled twice"):
        bake_head_scales(checkpoint, architecture, [HeadScale(0, 0, vector(16)), HeadScale(0, 0, vector(16))])


def test_nothing_asked_for_is_an_empty_patch(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("mixtral", tmp_path))
    patch = bake_residual_biases(checkpoint, architecture, [])
    assert not patch.edits
    assert not patch.json
    assert not patch.notes


def test_tensors_that_contradict_the_config(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("llama-biased", tmp_path))
    name = "model.layers.0.self_attn.o_proj"
    without = replace(checkpoint, tensors={k: v for k, v in checkpoint.tensors.items() if k != f"{name}.bias"})
    offset = [ResidualBias(0, "attn_out", vector(64))]
    with pytest.raises(InputError, match="no such tensor"):
        bake_residual_biases(without, architecture, offset)
    short = {**checkpoint.tensors, f"{name}.bias": tensor(torch.zeros(3), f"{name}.bias")}
    with pytest.raises(InputError, match="not what the config says"):
        bake_residual_biases(replace(checkpoint, tensors=short), architecture, offset)
    packed = {**checkpoint.tensors, f"{name}.weight": tensor(torch.zeros(64, 64, dtype=torch.uint8), f"{name}.weight")}
    with pytest.raises(Unsupported, match="cannot be computed with"):
        bake_head_scales(replace(checkpoint, tensors=packed), architecture, [HeadScale(0, 0, vector(16))])


def test_a_tensor_that_the_config_switches_off_is_not_switched_on(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("llama", tmp_path))
    name = "model.layers.1.self_attn.k_proj.bias"
    stray = replace(checkpoint, tensors={**checkpoint.tensors, name: tensor(torch.ones(32), name)})
    with pytest.raises(InputError, match="switches off"):
        bake_residual_biases(stray, architecture, [ResidualBias(0, "attn_out", vector(64))])
