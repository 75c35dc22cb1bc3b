"""Families without a row in the table, whose switches are found in the stock config class."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regraft.core.errors import Unsupported
from regraft.core.residual_bias import bake_residual_biases
from regraft.core.value_bias import check_value_bias
from tests.core.residual.support import Baked, attention_offsets, baked, mlp_offsets, open_base, value_offsets
from tests.families import CONFIGS, save_tiny

LLAMA = dict(CONFIGS["llama"])
EXTRA: dict[str, dict[str, Any]] = {
    "seed_oss": LLAMA,
    "arcee": LLAMA,
    "nemotron": LLAMA,
    "phi": LLAMA,
    "cohere": {**LLAMA, "logit_scale": 0.5},
    "gemma": LLAMA,
    "opt": {
        "vocab_size": 128,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_oss": {
        **LLAMA,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
ROUTES = {
    "seed_oss": ("switch attention_out_bias", "switch mlp_bias", "in place"),
    "arcee": ("switch attention_bias", "switch mlp_bias", "switch attention_bias"),
    "nemotron": ("switch attention_bias", "switch mlp_bias", "switch attention_bias"),
    "phi": ("in place", "in place", "in place"),
    "cohere": ("switch attention_bias", None, "switch attention_bias"),
    "gemma": ("switch attention_bias", None, "switch attention_bias"),
    "opt": ("in place", "in place", "in place"),
    "gpt_oss": ("in place", None, None),
}
SITES = (attention_offsets, mlp_offsets, value_offsets)
CASES = [(family, site, route) for family, routes in ROUTES.items() for site, route in zip(SITES, routes, strict=True)]


def save(family: str, folder: Path, **overrides: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**EXTRA[family], **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.2))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("family", "site", "route"), [case for case in CASES if case[2]])
def test_a_place_is_found(family: str, site, route: str, tmp_path: Path) -> None:
    result: Baked = baked(save(family, tmp_path / "base"), tmp_path / "baked", site)
    result.check()
    assert result.patch.notes[0].endswith(route)


@pytest.mark.parametrize(("family", "site"), [case[:2] for case in CASES if case[2] is None])
def test_no_place(family: str, site, tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save(family, tmp_path))
    with pytest.raises(Unsupported) as caught:
        bake_residual_biases(checkpoint, architecture, site(architecture))
    assert caught.value.remedy


def test_attention_sinks_leave_no_place_for_a_bias_of_values(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save("gpt_oss", tmp_path))
    with pytest.raises(Unsupported, match="sinks"):
        bake_residual_biases(checkpoint, architecture, value_offsets(architecture))


def test_clipped_values_are_refused(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("olmo", tmp_path, clip_qkv=1.0))
    with pytest.raises(Unsupported, match="clips its values"):
        bake_residual_biases(checkpoint, architecture, value_offsets(architecture))


def test_attention_that_nobody_looked_at_is_refused(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("llama", tmp_path))
    check_value_bias(checkpoint, architecture)
    family = replace(architecture.layout.family, model_type="somebody_elses")
    unknown = replace(architecture, layout=replace(architecture.layout, family=family))
    with pytest.raises(Unsupported, match="not known whether"):
        check_value_bias(checkpoint, unknown)
