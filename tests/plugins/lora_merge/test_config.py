"""adapter_config.json: what is read, what is ignored with reason, what is refused."""

import dataclasses
import json

import pytest
from peft import LoraConfig
from peft.utils.other import get_pattern_key

from regraft.core.errors import InputError, Unsupported
from regraft.plugins.lora_merge.config import READ, REFUSED, WITHOUT_EFFECT, LoraSettings, read_settings
from regraft.plugins.lora_merge.math import effective_scale

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def write(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_every_field_of_peft_is_accounted_for():
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == (READ | WITHOUT_EFFECT | REFUSED.keys()) - {"merge_weights"}
    assert not READ & WITHOUT_EFFECT
    assert not REFUSED.keys() & (READ | WITHOUT_EFFECT)


def test_defaults_of_peft_are_accepted(tmp_path):
    LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    settings, theirs = read_settings(tmp_path), LoraConfig()
    assert (settings.rank, settings.alpha) == (theirs.r, theirs.lora_alpha)
    assert (settings.rslora, settings.dora, settings.initialisation, settings.base_model) == (False, False, "", "")


def test_a_config_without_optional_fields(tmp_path):
    settings = read_settings(write(tmp_path, peft_type="LORA"))
    assert (settings.rank, settings.alpha) == (8, 8.0)


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_options_refused_by_name(field, tmp_path):
    read_settings(write(tmp_path, **PLAIN, **{field: None}))
    with pytest.raises(Unsupported, match=f"the adapter uses {field}: ") as refusal:
        read_settings(write(tmp_path, **PLAIN, **{field: [1]}))
    assert refusal.value.where.endswith(f"adapter_config.json: {field}")


def test_an_unknown_field_is_refused_if_it_is_set(tmp_path):
    read_settings(write(tmp_path, **PLAIN, use_hydra=False, hydra_config=None))
    with pytest.raises(Unsupported, match="the adapter uses use_hydra: regraft does not know this field"):
        read_settings(write(tmp_path, **PLAIN, use_hydra=True))


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "LOKR", "VERA", "OFT", "PREFIX_TUNING", "ADALORA", "XLORA"])
def test_other_adapters_are_refused_by_name(kind, tmp_path):
    with pytest.raises(Unsupported, match=f"an adapter of type {kind} is not merged"):
        read_settings(write(tmp_path, peft_type=kind))


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base(value, tmp_path):
    assert read_settings(write(tmp_path, **PLAIN, init_lora_weights=value)).initialisation == ""


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq"])
def test_initialisations_that_change_the_base(value, tmp_path):
    assert read_settings(write(tmp_path, **PLAIN, init_lora_weights=value)).initialisation == value


def test_an_unknown_initialisation(tmp_path):
    with pytest.raises(Unsupported, match="may have changed the base weights"):
        read_settings(write(tmp_path, **PLAIN, init_lora_weights="svd"))


MALFORMED = [
    ("r", 0), ("r", 8.5), ("r", True), ("r", "8"), ("lora_alpha", None), ("lora_alpha", [16]), ("use_rslora", "yes"),
    ("use_dora", 1), ("rank_pattern", [4]), ("rank_pattern", {"q": 0}), ("alpha_pattern", {"q": "1"}),
    ("rank_pattern", {"(": 4}), ("target_parameters", "experts"), ("modules_to_save", [1]), ("init_lora_weights", 3),
    ("fan_in_fan_out", "no"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), MALFORMED, ids=str)
def test_malformed_fields(field, value, tmp_path):
    with pytest.raises(InputError) as error:
        read_settings(write(tmp_path, **{**PLAIN, field: value}))
    assert f"adapter_config.json: {field}" in error.value.where


def test_no_peft_config(tmp_path):
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        read_settings(tmp_path)
    with pytest.raises(InputError, match="is not the config of a PEFT adapter"):
        read_settings(write(tmp_path, model_type="llama"))


PATTERNS = (
    "q_proj",
    "layers.1.self_attn.q_proj",
    r"layers\.\d+\.mlp\.(up|down)_proj",
    "^model.layers.0.self_attn.k_proj",
    "proj",
    ".*v_proj",
    "self_attn",
    "o_proj$",
    "a|b",
)


def test_patterns_mean_what_they_mean_in_peft():
    leaves = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    paths = [f"model.layers.{layer}.{leaf}" for layer in (0, 1, 11) for leaf in leaves]
    ranks = {pattern: index + 1 for index, pattern in enumerate(PATTERNS)}
    settings = LoraSettings(rank=99, alpha=1.0, rank_pattern=ranks, alpha_pattern={})
    found = {path: settings.rank_of(path) for path in paths}
    assert found == {path: ranks.get(get_pattern_key(PATTERNS, path), 99) for path in paths}
    assert len(set(found.values())) >= 6


def test_scales():
    assert effective_scale(16, 8) == 2.0
    assert effective_scale(16, 16, rslora=True) == 4.0
    patterned = LoraSettings(8, 16.0, {"k_proj": 2}, {"v_proj": 4.0}, rslora=True)
    assert patterned.scale_of("x.q_proj") == 16 / 8**0.5
    assert patterned.scale_of("x.k_proj") == 16 / 2**0.5
    assert patterned.scale_of("x.v_proj") == 4 / 8**0.5
