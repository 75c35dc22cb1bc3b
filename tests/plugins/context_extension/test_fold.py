"""The constant fold: exact on every family, by the query projection or by the query norm."""

from pathlib import Path
from typing import Any

import pytest

from regraft.core.errors import Unsupported
from regraft.core.patch import Edit, Patch, overlay
from regraft.core.patch_folder import load_patch, save_patch
from regraft.core.sources.folder import open_folder
from regraft.plugins.context_extension.fold import fold_logit_scale
from tests.materialise import materialise
from tests.plugins.context_extension.support import WINDOW, extend, load, rewrite_config, save, token_ids

FACTOR = 1.37
NORMED = {"qwen3", "qwen3_moe", "gemma3_text", "olmo2"}
FAMILIES = (
    "llama",
    "llama-biased",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3-biased",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "olmo2",
    "glm4",
    "granite",
    "falcon",
    "falcon-biased",
    "falcon-multi-query",
    "smollm3",
)


def multiply_logits(model: Any, factor: float) -> None:
    """Multiply attention logits the plain way: by the factor that each attention module already applies."""
    for module in model.modules():
        if hasattr(module, "_split_heads"):
            _scale_falcon(module, factor)
        elif hasattr(module, "scaling"):
            module.scaling = module.scaling * factor


def _scale_falcon(module: Any, factor: float) -> None:
    split = module._split_heads

    def scaled(fused: Any) -> Any:
        query, key, value = split(fused)
        return query * factor, key, value

    module._split_heads = scaled


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_is_multiplying_the_logits(family: str, tmp_path: Path) -> None:
    import torch

    base = save(family, tmp_path / "base")
    folded = extend(base, tmp_path / "folded", method="ntk", logit_scale=FACTOR)
    reference = load(extend(base, tmp_path / "plain", method="ntk").folder)
    ids = token_ids(2 * WINDOW)
    before = reference(ids).logits
    multiply_logits(reference, FACTOR)
    expected = reference(ids).logits
    assert (expected - before).abs().max() > 1e-2
    assert torch.allclose(load(folded.folder)(ids).logits, expected, atol=1e-5, rtol=1e-5)
    touched = {name.rpartition(".")[0].rpartition(".")[2] for name in folded.patch.edits}
    fused = {"phi3": "qkv_proj", "gpt_neox": "query_key_value", "falcon": "query_key_value"}
    assert touched == {
        "q_norm" if family.partition("-")[0] in NORMED else fused.get(family.partition("-")[0], "q_proj")
    }
    assert folded.patch.metrics["folded_logit_scale"] == FACTOR


def test_scaling_the_projection_under_a_query_norm_changes_nothing(tmp_path: Path) -> None:
    """Why the norm is scaled instead."""
    import torch

    model = load(save("qwen3", tmp_path / "base", rms_norm_eps=1e-12))
    ids = token_ids(WINDOW)
    before = model(ids).logits
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(FACTOR)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)


def test_the_fold_is_yarns_attention_factor_and_granites_multiplier(tmp_path: Path) -> None:
    import torch

    base = save("llama", tmp_path / "base")
    checkpoint = open_folder(base, label="base")
    patch = Patch(edits=fold_logit_scale(checkpoint, FACTOR))
    ids = token_ids(WINDOW)
    folded = load(materialise(overlay(checkpoint, patch, by="step"), tmp_path / "folded"))(ids).logits
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 1.0,
        "original_max_position_embeddings": WINDOW,
        "attention_factor": FACTOR**0.5,
    }
    yarn = load(rewrite_config(materialise(checkpoint, tmp_path / "yarn"), {"rope_parameters": rope}))(ids).logits
    granite_keys = {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_multiplier": FACTOR / 4.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }
    granite = load(rewrite_config(materialise(checkpoint, tmp_path / "granite"), granite_keys))(ids).logits
    assert torch.allclose(folded, yarn, atol=1e-5)
    assert torch.allclose(folded, granite, atol=1e-5)


def test_a_power_of_two_is_lossless_in_bfloat16(tmp_path: Path) -> None:
    import torch

    checkpoint = open_folder(save("llama", tmp_path / "base", dtype=torch.bfloat16), label="base")
    for name, edit in fold_logit_scale(checkpoint, 2.0).items():
        folded = overlay(checkpoint, Patch(edits={name: edit}), by="step").load(name)
        assert folded.dtype == torch.bfloat16
        assert torch.equal(folded.float(), 2 * checkpoint.load(name).float())


def test_the_edits_of_a_fused_projection_leave_keys_and_values(tmp_path: Path) -> None:
    import torch

    checkpoint = open_folder(save("gpt_neox", tmp_path / "base"), label="base")
    edits = fold_logit_scale(checkpoint, FACTOR)
    for name, edit in edits.items():
        assert isinstance(edit, Edit)
        before = checkpoint.load(name)
        after = overlay(checkpoint, Patch(edits={name: edit}), by="step").load(name)
        heads = before.view(4, 3, 16, -1), after.view(4, 3, 16, -1)
        assert torch.allclose(heads[1][:, 0], FACTOR * heads[0][:, 0])
        assert torch.equal(heads[1][:, 1:], heads[0][:, 1:])


def test_a_saved_patch_holds_the_fold(tmp_path: Path) -> None:
    import torch

    checkpoint = open_folder(save("phi3", tmp_path / "base"), label="base")
    patch = Patch(edits=fold_logit_scale(checkpoint, FACTOR))
    save_patch(patch, checkpoint, overlay(checkpoint, patch, by="step"), tmp_path / "saved.regraft")
    again, _ = load_patch(tmp_path / "saved.regraft")
    for name in patch.edits:
        tensors = [overlay(checkpoint, each, by="step").load(name) for each in (patch, again)]
        assert torch.equal(*tensors)


def test_clipped_queries_are_refused(tmp_path: Path) -> None:
    checkpoint = open_folder(save("olmo", tmp_path / "base", clip_qkv=8.0), label="base")
    with pytest.raises(Unsupported, match="clipped") as refusal:
        fold_logit_scale(checkpoint, FACTOR)
    assert refusal.value.remedy
