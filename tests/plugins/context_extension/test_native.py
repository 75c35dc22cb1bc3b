"""The Ministral3 carrier: stock code, bit-identical inside the window, a staircase outside."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from regraft.core.errors import Unsupported
from regraft.core.sources.folder import open_folder
from regraft.plugins.context_extension.math import entropy_scale, fit_beta, step_scale
from tests.plugins.context_extension.support import (
    WINDOW,
    Extended,
    apply,
    extend,
    greedy,
    load,
    rewrite_config,
    save,
    scale_outputs,
    token_ids,
)


@pytest.fixture(scope="module", params=["llama", "mistral", "llama-tied", "llama-wide-heads"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Extended, Extended]:
    """The native export and the abf-only export of one base."""
    folder = tmp_path_factory.mktemp(request.param)
    base = save(request.param, folder / "base")
    return extend(base, folder / "native"), extend(base, folder / "abf", export="abf-only")


def test_no_weight_changes_and_every_key_loads(pair: tuple[Extended, Extended]) -> None:
    native, _ = pair
    assert native.patch.edits == {}
    assert native.patch.renames == {}
    _, info = load_with_info(native.folder)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def load_with_info(folder: Path) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)


def test_bit_identical_inside_the_window_and_different_outside(pair: tuple[Extended, Extended]) -> None:
    import torch

    native, abf = (load(result.folder) for result in pair)
    assert type(native).__name__ == "Ministral3ForCausalLM"
    ids = token_ids(4 * WINDOW, batch=2)
    ours, theirs = native(ids).logits, abf(ids).logits
    assert torch.equal(ours[:, :WINDOW], theirs[:, :WINDOW])
    assert (ours[:, WINDOW:] - theirs[:, WINDOW:]).abs().max() > 0.01
    loss = [torch.nn.functional.cross_entropy(logits[0, : WINDOW - 1], ids[0, 1:WINDOW]) for logits in (ours, theirs)]
    assert torch.equal(*loss)


def test_a_zero_slope_is_plain_abf(pair: tuple[Extended, Extended], tmp_path: Path) -> None:
    import shutil

    import torch

    native, abf = pair
    flat = Path(shutil.copytree(native.folder, tmp_path / "flat"))
    rope = {**native.config["rope_parameters"], "llama_4_scaling_beta": 0.0}
    rewrite_config(flat, {"rope_parameters": rope})
    ids = token_ids(4 * WINDOW)
    assert torch.equal(load(flat)(ids).logits, load(abf.folder)(ids).logits)


def test_it_is_the_staircase_in_every_layer(pair: tuple[Extended, Extended]) -> None:
    import torch

    native, abf = (load(result.folder) for result in pair)
    scale_outputs(abf, "self_attn.q_proj", lambda p: step_scale(p, WINDOW, 1 / math.log(WINDOW)), layers=range(2))
    ids = token_ids(4 * WINDOW, batch=2)
    assert torch.allclose(native(ids).logits, abf(ids).logits, atol=1e-5)


def test_the_stock_function_is_the_staircase_of_the_report() -> None:
    import torch
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    positions = torch.arange(16_384)[None]
    window, beta = 4096, 1 / math.log(4096)
    stock = get_llama_4_attn_scale(positions, beta, window).flatten()
    exact = torch.tensor([entropy_scale(p, window) for p in range(16_384)])
    ours = torch.tensor([step_scale(p, window, beta) for p in range(16_384)])
    assert torch.allclose(stock, ours, atol=2e-7)
    assert (stock[:window] == 1).all()
    assert (stock - exact).min() > -3e-7
    assert (stock - exact).max() < math.log(2) / math.log(4096)


def test_with_a_cache_and_with_padding(pair: tuple[Extended, Extended]) -> None:
    import torch

    model = load(pair[0].folder)
    ids = token_ids(WINDOW - 4)
    assert greedy(model, ids) == greedy(model, ids, use_cache=False)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), token_ids(3 * WINDOW)], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with_padding = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    assert torch.allclose(with_padding, model(padded[:, 5:]).logits, atol=2e-5)


def test_the_written_config(pair: tuple[Extended, Extended]) -> None:
    native, _ = pair
    config, beta = native.config, 1 / math.log(WINDOW)
    assert config["model_type"] == "ministral3"
    assert config["architectures"] == ["Ministral3ForCausalLM"]
    assert config["rope_parameters"]["original_max_position_embeddings"] == WINDOW
    assert config["rope_parameters"]["llama_4_scaling_beta"] == beta
    assert config["llama_4_scaling"] == {"original_max_position_embeddings": WINDOW, "beta": beta}
    before = json.loads((native.base / "config.json").read_text())
    for key in ("rms_norm_eps", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "hidden_act"):
        assert config[key] == before[key], key
    assert config["head_dim"] * config["num_attention_heads"] == native.patch.metrics["rotary_dimensions"] * 4
    assert config.get("sliding_window") is None


def test_the_report(tmp_path: Path) -> None:
    base = save("llama", tmp_path / "base", max_position_embeddings=64)
    metrics = apply(open_folder(base, label="base"), target_length=512).metrics
    positions = range(64, 512)
    differences = [step_scale(p, 64, 1 / math.log(64)) - entropy_scale(p, 64) for p in positions]
    assert metrics["native_max_deviation"] == pytest.approx(max(differences), abs=1e-9)
    assert metrics["native_mean_deviation"] == pytest.approx(sum(differences) / len(positions), abs=1e-9)
    assert metrics["native_deviation_bound"] == math.log(2) / math.log(64) > metrics["native_max_deviation"]
    assert metrics["logit_scale_at"] == {
        "2x": pytest.approx(7 / 6),
        "4x": pytest.approx(8 / 6),
        "8x": pytest.approx(9 / 6),
    }
    assert metrics["rope_theta"] == 5e5
    assert metrics["longest_wavelength"] == pytest.approx(2 * math.pi * 5e5 ** (14 / 16))


@pytest.mark.parametrize(("beta", "expected"), [("fit", fit_beta(16, 64)), (0.1, 0.1)])
def test_other_slopes(beta: Any, expected: float, tmp_path: Path) -> None:
    patch = apply(open_folder(save("llama", tmp_path / "base"), label="base"), beta=beta)
    assert patch.json["config.json"]["rope_parameters"]["llama_4_scaling_beta"] == pytest.approx(expected)
    assert patch.metrics["native_beta"] == pytest.approx(expected)


def test_a_silent_config_is_written_out(tmp_path: Path) -> None:
    """What llama takes for granted is not what Ministral3 does: 8 key-value heads, 128 dimensions, pad 11."""
    import torch

    silent = ("pad_token_id", "rms_norm_eps", "num_key_value_heads", "head_dim", "bos_token_id", "rope_parameters")
    base = rewrite_config(save("llama-multi-head", tmp_path / "base"), {}, without=silent)
    native, abf = extend(base, tmp_path / "native"), extend(base, tmp_path / "abf", export="abf-only")
    assert native.config["rms_norm_eps"] == 1e-6
    assert native.config["pad_token_id"] == native.config["eos_token_id"] == 2
    assert any("pad token" in note for note in native.patch.notes)
    ids = token_ids(WINDOW)
    assert torch.equal(load(native.folder)(ids).logits, load(abf.folder)(ids).logits)


def test_a_null_pad_token_stays_null(tmp_path: Path) -> None:
    base = rewrite_config(save("llama", tmp_path / "base"), {"pad_token_id": None})
    native = extend(base, tmp_path / "native")
    assert native.config["pad_token_id"] is None
    assert load(native.folder).model.embed_tokens.padding_idx is None


def test_an_older_config_cannot_shadow_the_scale(tmp_path: Path) -> None:
    """transformers prefers rope_scaling to rope_parameters, so it must not survive."""
    old = {"rope_theta": 20_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "sliding_window": 4}
    base = rewrite_config(save("llama", tmp_path / "base"), old, without=("rope_parameters",))
    native = extend(base, tmp_path / "native")
    assert "rope_scaling" not in native.config
    assert "sliding_window" not in native.config
    model = load(native.folder)
    assert model.config.rope_parameters["llama_4_scaling_beta"] == 1 / math.log(WINDOW)
    assert model.config.rope_parameters["factor"] == 2.0
    assert model.config.rope_parameters["rope_theta"] == native.config["rope_theta"] == 5e5


def test_llama3_scaling_comes_along_where_its_window_is_the_models(tmp_path: Path) -> None:
    import torch

    rope = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": WINDOW, "rope_theta": 1e4}  # fmt: skip
    base = rewrite_config(save("llama", tmp_path / "base"), {"rope_parameters": rope, "max_position_embeddings": 32})
    checkpoint = open_folder(base, label="base")
    with pytest.raises(Unsupported, match="no stock class") as refusal:
        apply(checkpoint)
    assert "remote-code" in refusal.value.remedy
    native = extend(base, tmp_path / "native", original_length=WINDOW)
    abf = extend(base, tmp_path / "abf", export="abf-only", original_length=WINDOW)
    ids = token_ids(4 * WINDOW)
    ours, theirs = load(native.folder)(ids).logits, load(abf.folder)(ids).logits
    assert torch.equal(ours[:, :WINDOW], theirs[:, :WINDOW])


def test_notes_on_layers_and_tokenizer(tmp_path: Path) -> None:
    base = save("llama", tmp_path / "base", tokenizer=True)
    assert not any("AutoTokenizer" in note for note in apply(open_folder(base, label="base")).notes)
    document = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**document, "tokenizer_class": "GPT2TokenizerFast"}))
    notes = apply(open_folder(base, label="base")).notes
    assert any("every layer is scaled" in note for note in notes)
    assert any("GPT2Tokenizer" in note for note in notes)
    (base / "tokenizer.json").rename(base / "tokenizer.model")
    with pytest.raises(Unsupported, match=r"tokenizer\.json"):
        apply(open_folder(base, label="base"))


@pytest.mark.parametrize(
    ("family", "changes", "where"),
    [
        ("llama-biased", {}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map"),
        ("llama", {"attn_implementation": "mine"}, "attn_implementation"),
        ("mistral", {"sliding_window": 4096}, "sliding_window"),
        ("qwen2", {}, "model_type"),
        ("qwen3", {}, "model_type"),
        ("gemma2", {}, "model_type"),
        ("gpt_neox", {}, "model_type"),
    ],
)
def test_what_ministral3_cannot_carry(family: str, changes: dict[str, Any], where: str, tmp_path: Path) -> None:
    base = rewrite_config(save(family, tmp_path / "base"), changes)
    with pytest.raises(Unsupported) as refusal:
        apply(open_folder(base, label="base"))
    assert refusal.value.where == f"config.json: {where}"
    assert refusal.value.remedy


def test_mistral_with_its_default_window_is_refused(tmp_path: Path) -> None:
    base = rewrite_config(save("mistral", tmp_path / "base"), {}, without=("sliding_window",))
    with pytest.raises(Unsupported, match="no stock class"):
        apply(open_folder(base, label="base"))
    with pytest.raises(Unsupported, match="nothing to extend"):
        apply(open_folder(base, label="base"), target_length=8192)
