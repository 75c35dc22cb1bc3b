"""`[output] dtype`: what is converted, what is not, and what config.json says."""

import pytest

from regraft.core.cast import cast_patch
from regraft.core.patch import overlay
from regraft.core.sources import open_checkpoint
from tests.checkpoints import write_checkpoint


@pytest.fixture
def mixed(tmp_path):
    """Called with a config, a checkpoint of every kind of dtype."""
    import torch

    kinds = ("float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool")
    tensors = {kind: torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for kind in kinds}
    tensors["float8"] = torch.ones(2).to(torch.float8_e4m3fn)

    def checkpoint(**config):
        return open_checkpoint(write_checkpoint(tmp_path / "base", tensors, config={"model_type": "none", **config}))

    return checkpoint


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_floats_are_rounded_once_and_nothing_else_is_touched(name, mixed):
    import torch

    base = mixed(dtype="float32")
    patch = cast_patch(base, name)
    assert set(patch.edits) == {"float16", "bfloat16", "float32", "float64"} - {name}
    result = overlay(base, patch, by="cast")
    wanted = getattr(torch, name)
    for kind, tensor in result.tensors.items():
        expected = base.load(kind).to(wanted) if kind in patch.edits or kind == name else base.load(kind)
        assert torch.equal(tensor.load().view(torch.uint8), expected.view(torch.uint8))
    assert all(result.raw(kind) == base.raw(kind) for kind in ("int64", "uint8", "bool", "float8", name))
    assert result.config["dtype"] == name


@pytest.mark.parametrize(
    ("config", "change"),
    [
        ({}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "dtype": "float32"}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}),
        (
            {"dtype": "float32", "text_config": {"dtype": "float32", "vocab_size": 3}, "vision_config": {"depth": 1}},
            {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}},
        ),
    ],
)
def test_the_config_says_so_under_the_keys_that_it_has(config, change, mixed):
    assert cast_patch(mixed(**config), "bfloat16").json == {"config.json": change}
