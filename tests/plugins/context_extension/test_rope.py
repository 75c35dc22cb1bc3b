"""Config-only methods: what stock transformers makes of the written config, in every form of config and family."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from regraft.core.checkpoint import FileRef
from regraft.core.errors import InputError, Unsupported
from regraft.core.sources.folder import open_folder
from tests.plugins.context_extension.support import (
    WINDOW,
    apply,
    extend,
    load,
    rewrite_config,
    save,
    token_ids,
)

ROTARY = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "olmo",
    "olmo2",
    "glm4",
    "granite",
    "falcon",
    "smollm3",
    "starcoder2",
    "stablelm",
)
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "rope_theta": 1e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
    "rope_theta": 1e4,
}


def rotary(folder: Path) -> tuple[Any, float, int]:
    """inv_freq [d / 2] and the factor on cosines and sines that stock transformers uses, and d."""
    model = load(folder)
    modules = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    full = "full_attention_" if hasattr(modules[0], "full_attention_inv_freq") else ""
    frequencies = getattr(modules[0], f"{full}inv_freq")
    return frequencies, float(getattr(modules[0], f"{full}attention_scaling", 1.0)), 2 * len(frequencies)


def plain(theta: float, dim: int) -> Any:
    import torch

    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def yarn(theta: float, dim: int, factor: float, original: int, fast: float = 32, slow: float = 1) -> Any:
    """The frequencies of 2309.00071, section 3.2, written out pair by pair."""
    import torch

    def pair(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(pair(fast)), 0), min(math.ceil(pair(slow)), dim - 1)
    result = []
    for index, frequency in enumerate(plain(theta, dim).tolist()):
        ramp = min(max((index - low) / ((high - low) or 0.001), 0.0), 1.0)
        result.append((1 - ramp) * frequency + ramp * frequency / factor)
    return torch.tensor(result, dtype=torch.float64)


def assert_frequencies(folder: Path, expected: Any) -> None:
    import torch

    assert torch.allclose(rotary(folder)[0].double(), expected, rtol=2e-6, atol=0)


@pytest.fixture(scope="module", params=ROTARY)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory.mktemp(request.param) / "base")


def source(base: Path) -> tuple[float, int]:
    """Base and rotary dimensions before the step."""
    frequencies, _, dim = rotary(base)
    return float(frequencies[1]) ** (-dim / 2), dim


def test_every_method_gives_its_formula_in_every_family(base: Path, tmp_path: Path) -> None:
    theta, dim = source(base)
    theta = round(theta, -1)
    results = {method: extend(base, tmp_path / method, method=method) for method in ("abf", "linear", "ntk", "yarn")}
    auto = 5e5 if theta <= 1e5 else max(5e5, theta * 4 ** (dim / (dim - 2)))
    assert_frequencies(results["abf"].folder, plain(auto, dim))
    assert_frequencies(results["linear"].folder, plain(theta, dim) / 4)
    assert_frequencies(results["ntk"].folder, plain(theta * 4 ** (dim / (dim - 2)), dim))
    assert_frequencies(results["yarn"].folder, yarn(theta, dim, 4.0, WINDOW))
    assert rotary(results["yarn"].folder)[1] == pytest.approx(0.1 * math.log(4) + 1)
    for result in results.values():
        config = result.config
        assert config["max_position_embeddings"] == 4 * WINDOW
        assert result.patch.edits == {}
        assert config["model_type"] == json.loads((base / "config.json").read_text())["model_type"]


def test_yarn_takes_its_parameters(tmp_path: Path) -> None:
    base = save("llama", tmp_path / "base", max_position_embeddings=64)
    result = extend(
        base, tmp_path / "out", method="yarn", target_length=512, beta_fast=8.0, beta_slow=2.0, attention_factor=1.25
    )
    assert_frequencies(result.folder, yarn(1e4, 16, 8.0, 64, 8.0, 2.0))
    assert rotary(result.folder)[1] == 1.25


def test_a_base_of_ones_own(tmp_path: Path) -> None:
    base = save("llama", tmp_path / "base")
    assert_frequencies(extend(base, tmp_path / "out", method="abf", rope_theta=250_000.0).folder, plain(250_000.0, 16))
    with pytest.raises(Unsupported, match="smaller than the one"):
        apply(open_folder(base, label="base"), method="abf", rope_theta=9_000.0)


OLD_FORMS: dict[str, dict[str, Any]] = {
    "theta alone": {"rope_theta": 20_000.0},
    "scaling null": {"rope_theta": 20_000.0, "rope_scaling": None},
    "linear": {"rope_theta": 20_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "scaling alone": {"rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
}


METHODS_ON_OLD_FORMS = [
    (form, method)
    for form, keys in OLD_FORMS.items()
    for method in ("abf", "linear", "ntk", "yarn")
    if method != "yarn" or not keys.get("rope_scaling")
]
"""YaRN on interpolated positions is refused, see below."""


@pytest.mark.parametrize(("form", "method"), METHODS_ON_OLD_FORMS)
def test_older_configs_say_the_same_to_old_and_new_readers(form: str, method: str, tmp_path: Path) -> None:
    import torch

    keys = OLD_FORMS[form]
    base = rewrite_config(save("llama", tmp_path / "base"), keys, without=("rope_parameters",))
    theta, already = keys.get("rope_theta", 1e4), (keys.get("rope_scaling") or {}).get("factor", 1.0)
    result = extend(base, tmp_path / "out", method=method)
    expected = {
        "abf": plain(5e5, 16) / already,
        "linear": plain(theta, 16) / already / 4,
        "ntk": plain(theta * 4 ** (16 / 14), 16) / already,
        "yarn": yarn(theta, 16, 4.0, WINDOW),
    }[method]
    assert_frequencies(result.folder, expected)
    both = rotary(result.folder)[0]
    rewrite_config(result.folder, {}, without=("rope_parameters",))
    assert torch.equal(rotary(result.folder)[0], both)
    assert result.config["rope_theta"] == pytest.approx(result.patch.metrics["rope_theta"])
    scaling = result.config.get("rope_scaling")
    assert (scaling is None) == (method in ("abf", "ntk") and already == 1.0)
    if scaling:
        assert scaling["type"] == scaling["rope_type"]
    for key in ("rope_theta", "rope_scaling"):
        rewrite_config(
            result.folder, {"rope_parameters": result.patch.json["config.json"]["rope_parameters"]}, without=(key,)
        )
    assert torch.equal(rotary(result.folder)[0], both)


def test_an_older_gpt_neox(tmp_path: Path) -> None:
    keys = {"rotary_emb_base": 20_000.0, "rotary_pct": 0.5}
    base = rewrite_config(save("gpt_neox", tmp_path / "base"), keys, without=("rope_parameters",))
    result = extend(base, tmp_path / "out", method="ntk")
    assert_frequencies(result.folder, plain(20_000.0 * 4 ** (8 / 6), 8))
    assert result.config["rotary_emb_base"] == result.config["rope_parameters"]["rope_theta"]
    assert result.config["rope_parameters"]["partial_rotary_factor"] == 0.5


def test_gemma3_changes_full_attention_alone(tmp_path: Path) -> None:
    import torch

    for form, base in {
        "new": save("gemma3_text", tmp_path / "new"),
        "old": rewrite_config(
            save("gemma3_text", tmp_path / "old"),
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 12_000.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            without=("rope_parameters",),
        ),
    }.items():
        before, result = load(base), extend(base, tmp_path / f"{form}-out", method="ntk")
        after = load(result.folder)
        local = [model.model.rotary_emb.sliding_attention_inv_freq for model in (before, after)]
        assert torch.equal(*local)
        already = 8.0 if form == "old" else 1.0
        assert_frequencies(result.folder, plain(1e6 * 4 ** (24 / 22), 24) / already)
        assert any("full-attention layers" in note for note in result.patch.notes)


def test_gemma3_with_its_vision_tower(tmp_path: Path) -> None:
    base = save("gemma3", tmp_path / "base")
    patch = apply(open_folder(base, label="base"), method="abf", target_length=256)
    text = patch.json["config.json"]["text_config"]
    assert text["max_position_embeddings"] == 256
    assert text["rope_parameters"]["full_attention"]["rope_theta"] > 1e6
    assert "sliding_attention" not in text["rope_parameters"]


@pytest.mark.parametrize(
    ("rope", "works"),
    [
        (LINEAR, {"entropy-abf", "abf", "linear", "ntk"}),
        (LLAMA3, {"entropy-abf", "abf"}),
        (YARN, {"yarn"}),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, set()),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 8,
            },
            set(),
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_scaled_sources_are_composed_or_refused(rope: dict[str, Any], works: set[str], tmp_path: Path) -> None:
    base = rewrite_config(save("llama", tmp_path / "base"), {"rope_parameters": rope})
    checkpoint = open_folder(base, label="base")
    for method in ("entropy-abf", "abf", "linear", "ntk", "yarn"):
        export = {"export": "remote-code"} if method == "entropy-abf" else {}
        if method in works:
            assert any(
                "that was there" in note or "already" in note
                for note in apply(checkpoint, method=method, **export).notes
            )
            continue
        with pytest.raises(Unsupported, match="scaled already") as refusal:
            apply(checkpoint, method=method, **export)
        assert all(f"method {name}" in refusal.value.remedy or name in refusal.value.remedy for name in works)


def test_composed_frequencies(tmp_path: Path) -> None:
    bases = {
        kind["rope_type"]: rewrite_config(save("llama", tmp_path / kind["rope_type"]), {"rope_parameters": kind})
        for kind in (LINEAR, LLAMA3, YARN)
    }
    assert_frequencies(extend(bases["linear"], tmp_path / "1", method="linear").folder, plain(1e4, 16) / 8)
    assert_frequencies(extend(bases["linear"], tmp_path / "2", method="abf").folder, plain(5e5, 16) / 2)
    again = extend(bases["yarn"], tmp_path / "3", method="yarn", target_length=64)
    assert_frequencies(again.folder, yarn(1e4, 16, 8.0, 8))
    assert again.config["rope_parameters"]["factor"] == 8.0
    raised = extend(bases["llama3"], tmp_path / "4", method="abf").config["rope_parameters"]
    assert raised == {**LLAMA3, "rope_theta": 5e5}


def test_a_short_prompt_under_a_new_base_still_computes(tmp_path: Path) -> None:
    import torch

    result = extend(save("smollm3", tmp_path / "base"), tmp_path / "out", method="ntk")
    assert torch.isfinite(load(result.folder)(token_ids(64)).logits).all()


@pytest.mark.parametrize(
    ("changes", "values", "error", "reason"),
    [
        ({}, {"target_length": 16}, Unsupported, "reaches that far already"),
        ({}, {"target_length": 20, "original_length": 24}, Unsupported, "reaches that far already"),
        ({"model_type": "gpt2"}, {}, Unsupported, "learned table"),
        ({"max_position_embeddings": None}, {}, Unsupported, "what length"),
        ({"max_position_embeddings": "long"}, {}, InputError, "no length"),
        ({"rope_parameters": [1]}, {}, InputError, "not an object"),
        ({"rope_parameters": {"rope_theta": 0}}, {}, InputError, "out of range"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, {}, Unsupported, "of their own"),
        ({"model_type": "gemma3_text"}, {}, Unsupported, "per kind of layer"),
        ({"model_type": "gemma3"}, {}, InputError, "text model"),
        ({"model_type": "mistral", "sliding_window": 8}, {}, Unsupported, "nothing to extend"),
        ({"head_dim": 2}, {}, Unsupported, "too few rotary dimensions"),
        ({"model_type": "phi3"}, {"method": "yarn"}, Unsupported, "does not read rope_type yarn"),
        ({"model_type": "phi3"}, {"method": "linear"}, Unsupported, "does not read rope_type linear"),
        ({"head_dim": None, "hidden_size": None}, {}, InputError, "width of a head"),
    ],
)
def test_what_is_refused(
    changes: dict[str, Any], values: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    base = rewrite_config(save("llama", tmp_path / "base"), changes)
    with pytest.raises(error, match=reason) as refusal:
        apply(open_folder(base, label="base"), **{"method": "abf", **values})
    assert refusal.value.remedy


@pytest.mark.parametrize(
    ("limit", "becomes"),
    [(16, 64), (63, 64), (64, 64), (100, 100), (10**30, 10**30), (None, None), (True, True), (1e30, 1e30)],
)
def test_the_tokenizers_limit(limit: Any, becomes: Any, tmp_path: Path) -> None:
    base = save("llama", tmp_path / "base", tokenizer=True)
    document = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**document, "model_max_length": limit}))
    result = extend(base, tmp_path / "out", method="ntk")
    assert json.loads((result.folder / "tokenizer_config.json").read_text())["model_max_length"] == becomes


def test_no_tokenizer_config_is_invented_and_old_rotary_buffers_go(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = save("llama", tmp_path / "base")
    stale = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    save_file({**load_file(base / "model.safetensors"), **stale}, base / "model.safetensors", metadata={"format": "pt"})
    result = extend(base, tmp_path / "out", method="abf")
    assert not (result.folder / "tokenizer_config.json").exists()
    assert result.patch.removals == set(stale)
    assert_frequencies(result.folder, plain(5e5, 16))


def test_planning_reads_no_weight_and_imports_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    base = save("llama", tmp_path / "base", tokenizer=True)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from regraft.core.sources.folder import open_folder\n"
        "from regraft.plugins.context_extension import ContextExtension\n"
        "step = ContextExtension()\n"
        "base = open_folder(Path(sys.argv[1]), label='base')\n"
        "for extra in ({}, {'export': 'remote-code'}, {'method': 'yarn'}, {'logit_scale': 1.5}):\n"
        "    params = step.Params(target_length=64, **extra)\n"
        "    step.check(base, params)\n"
        "    step.plan(base, params)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(base)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_file_refs_hold_what_the_plan_promises(tmp_path: Path) -> None:
    patch = apply(open_folder(save("qwen2", tmp_path / "base"), label="base"), export="remote-code")
    (file,) = patch.files.values()
    assert isinstance(file, FileRef)
    assert file.nbytes == len(file.read()) > 0
