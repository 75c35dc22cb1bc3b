"""Every family of the table: offsets baked into a bias are what hooks add, after writing and reloading."""

from pathlib import Path

import pytest

from regraft.core.errors import Unsupported
from regraft.core.residual_bias import bake_residual_biases
from tests.core.residual.support import attention_offsets, baked, mlp_offsets, open_base, value_offsets
from tests.families import save_tiny

SWITCH = "switch attention_bias"
ATTENTION = {
    "llama": SWITCH,
    "llama-biased": "in place",
    "llama-tied": SWITCH,
    "llama-wide-heads": SWITCH,
    "llama-multi-head": SWITCH,
    "mistral": "re-expressed as llama",
    "mistral-wide-heads": "re-expressed as llama",
    "qwen2": "re-expressed as llama",
    "qwen2-tied": "re-expressed as llama",
    "qwen2-wide-heads": "re-expressed as llama",
    "phi3": "re-expressed as llama",
    "phi3-tied": "re-expressed as llama",
    "phi3-multi-head": "re-expressed as llama",
    "qwen3": SWITCH,
    "qwen3-biased": "in place",
    "qwen3_moe": SWITCH,
    "gemma2": SWITCH,
    "gemma3_text": SWITCH,
    "gemma3": SWITCH,
    "gpt2": "in place",
    "gpt_neox": "in place",
    "gpt_neox-unbiased": SWITCH,
    "olmo": SWITCH,
    "olmo2": SWITCH,
    "granite": SWITCH,
    "cohere2": SWITCH,
    "falcon": "switch bias",
    "falcon-biased": "in place",
    "falcon-multi-query": "switch bias",
    "falcon-sequential": "switch bias",
    "smollm3": SWITCH,
    "starcoder2": "in place",
}
MLP = {
    "llama": "switch mlp_bias",
    "llama-tied": "switch mlp_bias",
    "granite": "switch mlp_bias",
    "smollm3": "switch mlp_bias",
    "falcon": "switch bias",
    "gpt2": "in place",
    "gpt_neox-unbiased": "in place",
    "starcoder2": "in place",
    "qwen2-tied": "re-expressed as llama",
    "mistral": "re-expressed as llama",
    "phi3": "re-expressed as llama",
}
VALUES = {
    "llama": SWITCH,
    "qwen2": "in place",
    "qwen3": SWITCH,
    "gemma2": SWITCH,
    "gemma3_text": SWITCH,
    "glm4": "in place",
    "gpt2": "in place",
    "gpt_neox": "in place",
    "olmo": SWITCH,
    "cohere2": SWITCH,
    "falcon": "switch bias",
    "falcon-multi-query": "switch bias",
    "stablelm": "switch use_qkv_bias",
}
NONE_FOR_ATTENTION = ("mixtral", "ministral3", "glm4", "stablelm")
NONE_FOR_MLP = ("qwen3", "gemma2", "gemma3", "olmo2", "glm4", "cohere2", "olmo", "mixtral", "qwen3_moe")
NONE_FOR_VALUES = ("mistral", "phi3", "mixtral", "ministral3")


@pytest.mark.parametrize(("family", "route"), ATTENTION.items())
def test_attention_output(family: str, route: str, tmp_path: Path) -> None:
    result = baked(save_tiny(family, tmp_path / "base"), tmp_path / "baked", attention_offsets)
    result.check()
    assert result.patch.notes[0] == f"layers 0-1, attention output: {route}"


@pytest.mark.parametrize(("family", "route"), MLP.items())
def test_mlp_output(family: str, route: str, tmp_path: Path) -> None:
    result = baked(save_tiny(family, tmp_path / "base"), tmp_path / "baked", mlp_offsets)
    result.check()
    assert result.patch.notes[0] == f"layers 0-1, MLP output: {route}"


@pytest.mark.parametrize(("family", "route"), VALUES.items())
def test_values_of_a_group(family: str, route: str, tmp_path: Path) -> None:
    result = baked(save_tiny(family, tmp_path / "base"), tmp_path / "baked", value_offsets)
    result.check()
    assert result.patch.notes[0] == f"layers 0-1, values: {route}"


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "falcon"])
def test_all_sites_at_once(family: str, tmp_path: Path) -> None:
    result = baked(
        save_tiny(family, tmp_path / "base"),
        tmp_path / "baked",
        lambda architecture: [
            offset for offsets in (attention_offsets, mlp_offsets, value_offsets) for offset in offsets(architecture)
        ],
    )
    result.check()


@pytest.mark.parametrize(
    ("family", "offsets", "words"),
    [
        *((family, attention_offsets, "no bias for the attention output") for family in NONE_FOR_ATTENTION),
        *((family, mlp_offsets, "no bias|mixture of experts") for family in NONE_FOR_MLP),
        *((family, value_offsets, "no bias for the values") for family in NONE_FOR_VALUES),
    ],
)
def test_families_without_a_place(family: str, offsets, words: str, tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny(family, tmp_path))
    with pytest.raises(Unsupported, match=words) as caught:
        bake_residual_biases(checkpoint, architecture, offsets(architecture))
    assert caught.value.remedy


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3"])
def test_keep_class_never_takes_another(family: str, tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny(family, tmp_path))
    with pytest.raises(Unsupported, match="keep-class") as caught:
        bake_residual_biases(checkpoint, architecture, attention_offsets(architecture), mode="keep-class")
    assert "use mode auto" in str(caught.value.remedy)
    assert ("kv-group" in str(caught.value.remedy)) == (family == "qwen2")


def test_keep_class_is_no_hindrance_to_a_switch(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    baked(base, tmp_path / "baked", attention_offsets, mode="keep-class").check()
