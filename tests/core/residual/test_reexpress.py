"""Qwen2, Mistral and Phi-3 as Llama or SmolLM3: the same logits, the same bytes, and refusal where it is not so."""

import json
from pathlib import Path
from typing import Any

import pytest

from regraft.core.errors import Unsupported
from regraft.core.reexpress import reexpress
from regraft.core.residual_bias import ResidualBias, bake_residual_biases
from tests.core.residual.support import (
    LENGTH,
    attention_offsets,
    baked,
    hook,
    load,
    logits,
    mlp_offsets,
    open_base,
    vector,
    written,
)
from tests.families import save_tiny

WINDOW = 8
YARN = {
    "rope_type": "yarn",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
    "long_factor": [2.0 + 0.5 * pair for pair in range(8)],
}
SLIDING_QWEN2 = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen2": ("qwen2", {}, "llama"),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}, "llama"),
    "qwen2, tied, another epsilon": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}, "llama"),
    "qwen2, gelu": ("qwen2", {"hidden_act": "gelu"}, "llama"),
    "qwen2, second layer slides": ("qwen2", SLIDING_QWEN2, "smollm3"),
    "qwen2, first layer slides, wide heads": (
        "qwen2-wide-heads",
        {**SLIDING_QWEN2, "layer_types": ["sliding_attention", "full_attention"]},
        "smollm3",
    ),
    "qwen2, slides, no pad, tied": (
        "qwen2",
        {**SLIDING_QWEN2, "pad_token_id": None, "tie_word_embeddings": True},
        "smollm3",
    ),
    "mistral": ("mistral", {}, "llama"),
    "mistral, odd heads": ("mistral", {"num_attention_heads": 6, "head_dim": 16}, "smollm3"),
    "mistral, slides": ("mistral", {"sliding_window": WINDOW}, "smollm3"),
    "phi3": ("phi3", {}, "llama"),
    "phi3, longrope past the original length": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 32},
        "llama",
    ),
    "phi3, longrope within the original length": (
        "phi3",
        {"rope_parameters": LONG, "original_max_position_embeddings": 64},
        "llama",
    ),
    "phi3, slides": ("phi3", {"sliding_window": WINDOW}, "smollm3"),
}


def rewrite_config(folder: Path, without: tuple[str, ...] = (), **changes: Any) -> Path:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in without}))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same(case: str, tmp_path: Path) -> None:
    family, changes, target = CASES[case]
    base = save_tiny(family, tmp_path / "base", **changes)
    result = baked(base, tmp_path / "baked", lambda roles: [*attention_offsets(roles), *mlp_offsets(roles)])
    result.check()
    config = json.loads((result.folder / "config.json").read_text())
    assert config["model_type"] == target
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True


def test_the_windows_of_these_tests_matter(tmp_path: Path) -> None:
    slides = save_tiny("mistral", tmp_path / "slides", sliding_window=WINDOW)
    without = logits(load(save_tiny("mistral", tmp_path / "full")))
    assert (logits(load(slides)) - without).abs().max() > 0.5


@pytest.mark.parametrize("style", ["rope_theta", "rope_scaling"])
def test_configs_of_transformers_4(style: str, tmp_path: Path) -> None:
    base = save_tiny("qwen2", tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": 77777.0})
    scaling = {"type": "linear", "factor": 3.0} if style == "rope_scaling" else None
    extra = {} if scaling is None else {"rope_scaling": scaling}
    rewrite_config(base, ("rope_parameters",), rope_theta=77777.0, **extra)
    result = baked(base, tmp_path / "baked", attention_offsets)
    result.check()
    config = json.loads((result.folder / "config.json").read_text())
    assert config["rope_theta"] == 77777.0
    assert "rope_parameters" not in config
    assert ("rope_scaling" in config) == (style == "rope_scaling")


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("original", [32, 64])
def test_phi3_as_its_authors_wrote_it(kind: str, original: int, tmp_path: Path) -> None:
    """Names of LongRoPE before it had one; the original length beside the parameters, not among them."""
    long = {"rope_parameters": LONG, "original_max_position_embeddings": original}
    base = save_tiny("phi3", tmp_path / "base", **long)
    plain = logits(load(base))
    factors: dict[str, Any] = {key: LONG[key] for key in ("short_factor", "long_factor")}
    if kind == "su":  # transformers 5 wants it there for this name
        factors["original_max_position_embeddings"] = original
    rewrite_config(base, ("rope_parameters",), rope_theta=10000.0, rope_scaling={"type": kind, **factors})
    assert (logits(load(base)) - plain).abs().max() <= 1e-5
    baked(base, tmp_path / "baked", attention_offsets).check()


def test_keys_that_are_absent_mean_what_the_old_class_took(tmp_path: Path) -> None:
    base = save_tiny("phi3", tmp_path / "base", rms_norm_eps=1e-5)
    absent = ("rms_norm_eps", "rope_parameters", "sliding_window", "hidden_act", "attention_dropout")
    result = baked(rewrite_config(base, absent), tmp_path / "baked", attention_offsets)
    result.check()
    config = json.loads((result.folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 10000.0


def test_a_mistral_without_a_word_on_windows_has_one(tmp_path: Path) -> None:
    base = rewrite_config(save_tiny("mistral", tmp_path), ("sliding_window",))
    checkpoint, architecture = open_base(base)
    with pytest.raises(Unsupported, match="no sliding window"):
        reexpress(checkpoint, architecture, "llama")
    assert reexpress(checkpoint, architecture, "smollm3").config["sliding_window"] == 4096


REFUSALS: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral slides": ("mistral", {"sliding_window": WINDOW}, "llama"),
    "qwen2 slides": ("qwen2", SLIDING_QWEN2, "llama"),
    "phi3 slides": ("phi3", {"sliding_window": WINDOW}, "llama"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_windows_do_not_fit_into_llama(case: str, tmp_path: Path) -> None:
    family, changes, target = REFUSALS[case]
    checkpoint, architecture = open_base(save_tiny(family, tmp_path, **changes))
    with pytest.raises(Unsupported, match="cannot be written as llama: it has no sliding window"):
        reexpress(checkpoint, architecture, target)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["llama", "smollm3"])
def test_partial_rotary_positions_fit_into_neither(target: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    checkpoint, architecture = open_base(save_tiny("phi3", tmp_path, rope_parameters=rope))
    with pytest.raises(Unsupported, match="turns whole heads"):
        reexpress(checkpoint, architecture, target)
    with pytest.raises(Unsupported, match=r"no bias for the attention output.*turns whole heads"):
        bake_residual_biases(checkpoint, architecture, attention_offsets(architecture))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "only the language model"),
        ({"attn_implementation": "somebody_elses"}, "an attention of its own"),
        ({"eos_token_id": None}, "its own default"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "not known which of its layers slide"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "not known which of its layers slide"),
    ],
)
def test_configs_that_say_too_much_or_too_little(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint, architecture = open_base(rewrite_config(save_tiny("qwen2", tmp_path), **changes))
    for target in ("llama", "smollm3"):
        with pytest.raises(Unsupported, match=words):
            reexpress(checkpoint, architecture, target)


def test_only_known_classes(tmp_path: Path) -> None:
    checkpoint, architecture = open_base(save_tiny("mixtral", tmp_path))
    with pytest.raises(Unsupported, match="not known which other stock class"):
        reexpress(checkpoint, architecture, "llama")


def test_fused_tensors_come_apart_without_being_read(tmp_path: Path) -> None:
    base = save_tiny("phi3", tmp_path / "base")
    checkpoint, architecture = open_base(base)
    split = reexpress(checkpoint, architecture, "llama")
    assert split.removals == {
        f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")
    }
    patch = bake_residual_biases(checkpoint, architecture, [ResidualBias(0, "attn_out", vector(64))])
    from regraft.core.patch import overlay

    above = overlay(checkpoint, patch, by="step")
    stored = (base / "model.safetensors").read_bytes()
    for name, spec in above.specs.items():
        if not name.endswith(".bias"):
            raw = above.raw(name)
            assert raw is not None, name
            assert raw.nbytes == spec.nbytes
            on_disk = stored[raw.offset : raw.offset + raw.nbytes]
            assert above.load(name).numpy().tobytes() == on_disk
    fused = checkpoint.load("model.layers.1.self_attn.qkv_proj.weight")
    for name, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        assert (above.load(f"model.layers.1.self_attn.{name}_proj.weight") == fused[rows]).all()


def test_a_base_model_without_a_head(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModel

    from tests.families import tiny

    tiny("qwen2").model.save_pretrained(tmp_path / "base")
    checkpoint, architecture = open_base(tmp_path / "base")
    offsets = [ResidualBias(1, "attn_out", vector(64))]
    folder = written(checkpoint, bake_residual_biases(checkpoint, architecture, offsets), tmp_path / "baked")
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaModel"]
    ids = torch.arange(3, 3 + LENGTH)[None]
    base = tiny("qwen2")
    with torch.inference_mode():
        plain = base.model(ids).last_hidden_state
        hooked = hook(base, architecture, offsets).model(ids).last_hidden_state
        after = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()(ids).last_hidden_state
    assert (hooked - plain).abs().max() > 0.5
    assert (after - hooked).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3"])
@pytest.mark.parametrize("named", [True, False])
def test_the_tokenizer_stays_what_it_was(family: str, named: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = save_tiny(family, tmp_path / "base", tokenizer=True)
    if not named:
        path = base / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in config.items() if key != "tokenizer_class"}))
    result = baked(base, tmp_path / "baked", attention_offsets)
    text = "It's 12345 o'clock,\n\n  and all is well!  a b"
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, result.folder))
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(after(text)["input_ids"]) == before.decode(before(text)["input_ids"])


def test_code_of_the_old_class_stays_behind(tmp_path: Path) -> None:
    base = save_tiny("phi3", tmp_path)
    (base / "configuration_phi3.py").write_text("# somebody's code\n")
    rewrite_config(base, auto_map={"AutoConfig": "configuration_phi3.Phi3Config"})
    checkpoint, architecture = open_base(base)
    patch = bake_residual_biases(checkpoint, architecture, attention_offsets(architecture))
    assert set(patch.dropped) == {"configuration_phi3.py"}
    assert patch.json["config.json"]["auto_map"] is None
