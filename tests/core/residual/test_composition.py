"""Offsets and scales by their algebra: what adds up, what undoes itself, what stays byte for byte, what order means."""

import subprocess
import sys
from pathlib import Path

import pytest

from regraft.core.architectures import architecture_of
from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Patch, overlay
from regraft.core.residual_bias import HeadOffset, HeadScale, ResidualBias, bake_head_scales, bake_residual_biases
from tests.core.residual.support import (
    attention_offsets,
    baked,
    hook,
    ids,
    load,
    logits,
    mlp_offsets,
    open_base,
    value_offsets,
    vector,
    written,
)
from tests.families import save_tiny

FAMILIES = ("llama", "qwen2", "gpt2", "falcon-biased", "gpt_neox")


def bake(checkpoint: Checkpoint, offsets, scales=()) -> Patch:
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    return bake_residual_biases(checkpoint, architecture, offsets(architecture), scales=scales)


def scales_of(architecture) -> list[HeadScale]:
    size = architecture.head_dim
    return [HeadScale(0, 1, vector(size, seed=7)), HeadScale(1, 0, vector(size, seed=8), scale=-0.5)]


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_offsets_change_no_bit(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    checkpoint, architecture = open_base(base)
    zeros = [
        ResidualBias(0, "attn_out", vector(architecture.hidden_size, scale=0.0)),
        ResidualBias(1, "mlp_out", vector(architecture.hidden_size), scale=0.0),
        HeadOffset(1, 2, vector(architecture.head_dim, scale=0.0)),
    ]
    patch = bake_residual_biases(checkpoint, architecture, zeros)
    above = overlay(checkpoint, patch, by="step")
    for name in checkpoint.specs:
        assert above.load(name).numpy().tobytes() == checkpoint.load(name).numpy().tobytes(), name
    added = set(above.specs) - set(checkpoint.specs)
    assert all(name.endswith(".bias") and not above.load(name).any() for name in added)
    assert bool(added) == (family in ("llama", "qwen2"))
    assert (logits(load(written(checkpoint, patch, tmp_path / "baked"))) == logits(load(base))).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "falcon"])
def test_without_scales_the_bytes_of_every_weight_stay_on_disk(family: str, tmp_path: Path) -> None:
    checkpoint, _ = open_base(save_tiny(family, tmp_path))
    above = overlay(checkpoint, bake(checkpoint, lambda a: [*attention_offsets(a), *mlp_offsets(a)]), by="step")
    weights = [name for name in checkpoint.specs if not name.endswith(".bias")]
    assert weights
    assert all(above.raw(name) == checkpoint.raw(name) is not None for name in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_are_one_with_the_sum(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    checkpoint, architecture = open_base(base)
    hidden, size = architecture.hidden_size, architecture.head_dim
    first = [ResidualBias(0, "attn_out", vector(hidden)), HeadOffset(1, 3, vector(size, seed=1))]
    second = [ResidualBias(0, "attn_out", vector(hidden, seed=4)), HeadOffset(1, 3, vector(size, seed=5))]
    once = overlay(checkpoint, bake_residual_biases(checkpoint, architecture, [*first, *second]), by="once")
    below = overlay(checkpoint, bake_residual_biases(checkpoint, architecture, first), by="first")
    again = architecture_of(below.config, below.specs)
    twice = overlay(below, bake_residual_biases(below, again, second), by="second")
    assert set(once.specs) == set(twice.specs)
    assert once.config == twice.config
    for name in once.specs:
        one, two = once.load(name), twice.load(name)
        assert (one - two).abs().max() <= 1e-6, name
    assert any((once.load(name) != checkpoint.load(name)).any() for name in checkpoint.specs if name in once.specs) or (
        set(once.specs) > set(checkpoint.specs)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_negative_undoes_it(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    checkpoint, architecture = open_base(base)
    offsets = attention_offsets(architecture)
    below = overlay(checkpoint, bake_residual_biases(checkpoint, architecture, offsets), by="there")
    back = [
        ResidualBias(o.layer, o.site, o.vector, -o.scale)
        if isinstance(o, ResidualBias)
        else HeadOffset(o.layer, o.head, o.vector, o.site, -o.scale)
        for o in offsets
    ]
    patch = bake_residual_biases(below, architecture_of(below.config, below.specs), back)
    plain = logits(load(base))
    there = logits(load(written(checkpoint, bake_residual_biases(checkpoint, architecture, offsets), tmp_path / "a")))
    restored = logits(load(written(below, patch, tmp_path / "b")))
    assert (there - plain).abs().max() >= 0.5
    assert (restored - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2", "falcon", "phi3"])
def test_scales_with_offsets(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    _, architecture = open_base(base)
    baked(base, tmp_path / "baked", attention_offsets, scales=scales_of(architecture)).check()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "falcon", "mixtral", "glm4", "mistral"])
def test_scales_alone_need_no_bias(family: str, tmp_path: Path) -> None:
    base = save_tiny(family, tmp_path / "base")
    checkpoint, architecture = open_base(base)
    wanted = scales_of(architecture)
    patch = bake_head_scales(checkpoint, architecture, wanted)
    assert not patch.json
    plain = logits(load(base))
    hooked = logits(hook(load(base), architecture, [], wanted))
    after = logits(load(written(checkpoint, patch, tmp_path / "baked")))
    assert (hooked - plain).abs().max() >= 0.1
    assert (after - hooked).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scales_touch_their_columns_only(family: str, tmp_path: Path) -> None:
    import torch

    checkpoint, architecture = open_base(save_tiny(family, tmp_path, dtype=torch.bfloat16))
    scale = vector(architecture.head_dim, seed=3)
    patch = bake_head_scales(checkpoint, architecture, [HeadScale(1, 2, scale)])
    slot = architecture.slot("o_proj", 1)
    assert set(patch.edits) == {slot.tensor}
    before, after = checkpoint.load(slot.tensor), overlay(checkpoint, patch, by="step").load(slot.tensor)
    before, after = (matrix.T if slot.transposed else matrix for matrix in (before, after))
    columns = architecture.head_columns(2)
    expected = before.clone()
    expected[:, columns] = (before[:, columns].double() * (1 + scale.load().double())).to(torch.bfloat16)
    assert (after != before).any()
    assert ((after.float() - expected.float()).abs() <= 2**-8 * expected.float().abs()).all()
    others = [column for column in range(before.shape[1]) if not columns.start <= column < columns.stop]
    assert (after[:, others] == before[:, others]).all()


def test_order_matters_once_there_are_scales(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("llama", tmp_path))
    offsets = [HeadOffset(0, 1, vector(architecture.head_dim))]
    scales = [HeadScale(0, 1, vector(architecture.head_dim, seed=9))]
    together = overlay(checkpoint, bake_residual_biases(checkpoint, architecture, offsets, scales=scales), by="both")
    scaled = overlay(checkpoint, bake_head_scales(checkpoint, architecture, scales), by="scales")
    after = overlay(scaled, bake_residual_biases(scaled, architecture, offsets), by="offsets")
    bias, weight = (architecture.slot("o_proj", 0).tensor.replace("weight", end) for end in ("bias", "weight"))
    columns, v = architecture.head_columns(1), offsets[0].vector.load().double()
    unscaled = checkpoint.load(weight).double()[:, columns] @ v
    assert (together.load(bias) - unscaled).abs().max() <= 1e-6
    assert (after.load(bias) - scaled.load(weight).double()[:, columns] @ v).abs().max() <= 1e-6
    assert (after.load(bias) - together.load(bias)).abs().max() > 0.05
    assert (after.load(weight) == together.load(weight)).all()


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "cohere2"])
def test_left_padding_and_biases_of_values(family: str, tmp_path: Path) -> None:
    import torch

    base = save_tiny(family, tmp_path / "base")
    checkpoint, architecture = open_base(base)
    offsets = value_offsets(architecture)
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[0, :11] = 0
    tokens = tokens.masked_fill(mask == 0, 0)
    plain = logits(load(base), tokens, attention_mask=mask)
    hooked = logits(hook(load(base), architecture, offsets), tokens, attention_mask=mask)
    folder = written(checkpoint, bake_residual_biases(checkpoint, architecture, offsets), tmp_path / "baked")
    after = logits(load(folder), tokens, attention_mask=mask)
    real = mask.bool()
    assert (hooked - plain)[real].abs().max() >= 0.5
    assert (after - hooked)[real].abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2"])
def test_bfloat16(family: str, tmp_path: Path) -> None:
    """One rounding of the bias: predictions agree with those of the hooked model in bf16 (KL, and the first token)."""
    import torch

    base = save_tiny(family, tmp_path / "base", dtype=torch.bfloat16)
    checkpoint, architecture = open_base(base)
    offsets = attention_offsets(architecture)
    patch = bake_residual_biases(checkpoint, architecture, offsets)
    above = overlay(checkpoint, patch, by="step")
    assert {spec.dtype for spec in above.specs.values()} == {"BF16"}
    bias = architecture.slot("o_proj", 0).tensor.replace("weight", "bias")
    start = checkpoint.load(bias).double() if bias in checkpoint.specs else 0.0
    assert (above.load(bias) == (start + offsets[0].vector.load().double()).to(torch.bfloat16)).all()
    plain = logits(load(base)).log_softmax(-1)
    hooked = logits(hook(load(base), architecture, offsets)).log_softmax(-1)
    after = logits(load(written(checkpoint, patch, tmp_path / "baked"))).log_softmax(-1)
    assert (hooked.exp() * (hooked - plain)).sum(-1).mean() > 0.05
    assert (hooked.exp() * (hooked - after)).sum(-1).max() < 1e-4
    assert (hooked.argmax(-1) == after.argmax(-1)).float().mean() > 0.97


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_a_saved_patch_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    from regraft.core.patch_folder import load_patch, save_patch

    checkpoint, architecture = open_base(save_tiny(family, tmp_path / "base"))
    offsets = [*attention_offsets(architecture), *mlp_offsets(architecture)]
    patch = bake_residual_biases(checkpoint, architecture, offsets, scales=scales_of(architecture))
    above = overlay(checkpoint, patch, by="step")
    save_patch(patch, checkpoint, above, tmp_path / "saved.regraft")
    again = overlay(checkpoint, load_patch(tmp_path / "saved.regraft")[0], by="again")
    assert dict(again.specs) == dict(above.specs)
    assert all((again.load(name) == above.load(name)).all() for name in above.specs)


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    save_tiny("phi3", tmp_path)
    code = """
import sys
from pathlib import Path
from regraft.core.architectures import architecture_of
from regraft.core.derived import ConstantTensor
from regraft.core.patch import overlay
from regraft.core.residual_bias import HeadOffset, HeadScale, ResidualBias, bake_residual_biases
from regraft.core.sources.folder import open_folder
from regraft.core.specs import TensorSpec
checkpoint = open_folder(Path(sys.argv[1]), label="base")
architecture = architecture_of(checkpoint.config, checkpoint.specs)
whole = ConstantTensor(TensorSpec("v", "F32", (64,)), bytes(256))
head = ConstantTensor(TensorSpec("h", "F32", (16,)), bytes(64))
offsets = [ResidualBias(0, "mlp_out", whole), HeadOffset(1, 2, head)]
patch = bake_residual_biases(checkpoint, architecture, offsets, scales=[HeadScale(0, 0, head)])
assert len(overlay(checkpoint, patch, by="step").specs) > len(checkpoint.specs)
assert not {"torch", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
