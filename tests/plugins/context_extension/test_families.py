"""The table of families against the stock config classes."""

from typing import Any

import pytest

from regraft.core.errors import Unsupported
from regraft.plugins.context_extension.exports import NATIVE_DEFAULTS
from regraft.plugins.context_extension.families import FAMILIES, family_of, windows_of
from regraft.plugins.context_extension.rope import read_rope, text_config

SIZES = {"hidden_size": 192, "num_attention_heads": 6, "num_hidden_layers": 6}
NESTED = {"gemma3": {"text_config": SIZES}}
OLD = {"rope_theta": 20_000.0}
OLD_NAMES: dict[str, dict[str, Any]] = {"gpt_neox": {"rotary_emb_base": 20_000.0, "rotary_pct": 0.5}}
PARTIAL = ("phi", "glm", "glm4", "stablelm", "phi3")


def stock_config(model_type: str, **keys: Any) -> Any:
    from transformers import AutoConfig

    document = NESTED.get(model_type, SIZES)
    if model_type in NESTED:
        document = {"text_config": {**SIZES, **keys}}
    return AutoConfig.for_model(model_type, **({**document, **keys} if model_type not in NESTED else document))


def our_rope(model_type: str, **keys: Any) -> Any:
    family = FAMILIES[model_type]
    config = {"text_config": {**SIZES, **keys}} if family.nested else {**SIZES, **keys}
    return read_rope(text_config(config, family), family)


def stock_rope(model_type: str, **keys: Any) -> tuple[dict[str, Any], int]:
    text = stock_config(model_type, **keys).get_text_config()
    parameters = text.rope_parameters.get("full_attention", text.rope_parameters)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return parameters, int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def assert_same_rope(model_type: str, **keys: Any) -> None:
    ours, (stock, dim) = our_rope(model_type, **keys), stock_rope(model_type, **keys)
    assert (ours.kind, ours.theta, ours.dim) == (stock["rope_type"], stock["rope_theta"], dim)
    assert ours.parameters.get("factor") == stock.get("factor")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_silent_config_means(model_type: str) -> None:
    assert_same_rope(model_type)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_how_the_older_form_is_read(model_type: str) -> None:
    keys = OLD_NAMES.get(model_type, OLD)
    assert_same_rope(model_type, **keys)
    if "linear" in FAMILIES[model_type].rope_types:
        assert_same_rope(model_type, **keys, rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0})
        assert_same_rope(model_type, **keys, rope_scaling={"type": "linear", "factor": 2.0})
    if model_type in PARTIAL:
        assert_same_rope(model_type, **keys, partial_rotary_factor=0.25)


@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if not family.local_key])
def test_how_the_newer_form_is_read(model_type: str) -> None:
    given = {"rope_type": "default", "rope_theta": 30_000.0, "partial_rotary_factor": 0.5}
    if FAMILIES[model_type].partial == 1.0:
        del given["partial_rotary_factor"]
    assert_same_rope(model_type, rope_parameters=given)


def test_gemma3_keeps_a_base_for_each_kind_of_layer() -> None:
    nested = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    assert_same_rope("gemma3_text", rope_parameters=nested)
    assert our_rope("gemma3", rope_parameters=nested).parameters == nested["full_attention"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_class_names_and_windows(model_type: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = FAMILIES[model_type]
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] == family.stock_class
    text = stock_config(model_type).get_text_config()
    if windows_of(family, SIZES, 10**6) == "none":
        assert not getattr(text, "sliding_window", None) or "unrotated" in family.windows
        assert "sliding_attention" not in (getattr(text, "layer_types", None) or [])
    else:
        assert text.sliding_window == family.window


@pytest.mark.parametrize(
    ("model_type", "keys", "expected"),
    [
        ("mistral", {}, "all"),
        ("mistral", {"sliding_window": None}, "none"),
        ("mistral", {"sliding_window": 8192}, "none"),
        ("phi3", {"sliding_window": 2047}, "all"),
        ("qwen2", {"sliding_window": 64}, "none"),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}, "some"),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, "all"),
        ("qwen3_moe", {"use_sliding_window": True}, "all"),
        ("gemma2", {}, "some"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 64}, "none"),
        ("llama", {"sliding_window": 64}, "none"),
    ],
)
def test_which_layers_are_windowed(model_type: str, keys: dict[str, Any], expected: str) -> None:
    assert windows_of(FAMILIES[model_type], {**SIZES, **keys}, 8192) == expected
    config = stock_config(model_type, **keys)
    types = getattr(config, "layer_types", None)
    if model_type.startswith("qwen") and types:
        kinds = {"none": {"full_attention"}, "all": {"sliding_attention"}}
        assert set(types) == kinds.get(expected, {"full_attention", "sliding_attention"})


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gpt2"}, "learned table"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi"),
        ({"model_type": "cohere2"}, "nothing to extend"),
        ({"model_type": "ministral3"}, "scale already"),
        ({"model_type": "mamba"}, "not known"),
        ({}, "not known"),
    ],
)
def test_families_that_are_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason) as refusal:
        family_of(config)
    assert refusal.value.remedy


@pytest.mark.parametrize("model_type", NATIVE_DEFAULTS)
def test_the_defaults_that_native_writes_out(model_type: str) -> None:
    from transformers import AutoConfig, Ministral3Config

    stock = AutoConfig.for_model(model_type).to_dict()
    carrier = Ministral3Config().to_dict()
    differing = {key for key, value in stock.items() if key in carrier and carrier[key] != value}
    written = set(NATIVE_DEFAULTS[model_type])
    decided_otherwise = {"model_type", "architectures", "max_position_embeddings", "rope_parameters", "sliding_window"}
    assert differing - decided_otherwise <= written
    derived = {"num_key_value_heads": 32, "head_dim": 128}
    for key, value in NATIVE_DEFAULTS[model_type].items():
        assert stock[key] == (derived[key] if value is None and key in derived else value), key
