"""The exact scale by code in the checkpoint, against models whose queries are scaled by hand."""

import ast
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.core.errors import Unsupported
from regraft.core.sources.folder import open_folder
from regraft.plugins.context_extension.exports import CLASS, MODULE, remote_code
from regraft.plugins.context_extension.families import FAMILIES
from regraft.plugins.context_extension.math import entropy_scale
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

WRAPPED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
    "olmo",
    "olmo2",
    "glm4",
    "granite",
    "smollm3",
    "starcoder2",
    "stablelm",
)
UNTESTED_HERE = ("gemma", "phi", "glm", "cohere")
"""Families that `tests.families` has no configs for."""


def pair(family: str, folder: Path, **values: Any) -> tuple[Extended, Extended]:
    """The remote-code export, no layer skipped unless said so, and the abf-only export."""
    base = save(family, folder / f"{family}-base")
    code = extend(base, folder / f"{family}-code", export="remote-code", **{"skip_layers": 0, **values})
    return code, extend(base, folder / f"{family}-abf", export="abf-only")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Extended, Extended]]:
    made: dict[str, tuple[Extended, Extended]] = {}

    def make(family: str) -> tuple[Extended, Extended]:
        if family not in made:
            made[family] = pair(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


def exact(position: int) -> float:
    return entropy_scale(position, WINDOW)


@pytest.mark.parametrize("family", WRAPPED)
def test_every_family_is_bit_identical_inside_the_window_and_consistent_outside(family: str, exported: Any) -> None:
    import torch

    code, abf = exported(family)
    model, plain = load(code.folder, trust=True), load(abf.folder)
    eager = load(code.folder, trust=True, attn_implementation="eager")
    ids = token_ids(4 * WINDOW, batch=2)
    ours, theirs = model(ids).logits, plain(ids).logits
    assert isinstance(model, type(plain))
    assert torch.equal(ours[:, :WINDOW], theirs[:, :WINDOW])
    assert (ours - theirs).abs().max() > 1e-2
    assert torch.allclose(eager(ids).logits, ours, atol=1e-4)
    assert greedy(model, ids[:1, :12]) == greedy(model, ids[:1, :12], use_cache=False)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), ids[:1, : 2 * WINDOW]], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 7).long()[None]
    assert greedy(model, padded, attention_mask=mask)[0][7:] == greedy(model, padded[:, 7:])[0]


QUERIES = {
    "llama": ("self_attn.q_proj", None),
    "qwen2": ("self_attn.q_proj", None),
    "qwen3": ("self_attn.q_norm", None),
    "olmo2": ("self_attn.q_norm", None),
    "granite": ("self_attn.q_proj", None),
    "phi3": ("self_attn.qkv_proj", slice(0, 64)),
}


@pytest.mark.parametrize("skipped", [0, 1, 2])
@pytest.mark.parametrize("family", QUERIES)
def test_it_is_the_exact_scale_from_the_first_layer_that_is_not_skipped(
    family: str, skipped: int, exported: Any, tmp_path: Path
) -> None:
    import torch

    code, abf = exported(family)
    code = extend(code.base, tmp_path / f"{family}-{skipped}", export="remote-code", skip_layers=skipped)
    reference = load(abf.folder)
    name, rows = QUERIES[family]
    scale_outputs(reference, name, exact, layers=range(skipped, 2), rows=rows)
    ids = token_ids(4 * WINDOW, batch=2)
    ours = load(code.folder, trust=True)(ids).logits
    assert torch.allclose(ours, reference(ids).logits, atol=2e-5)
    if skipped == 2:
        assert torch.equal(ours, load(abf.folder)(ids).logits)


def test_layers_with_a_window_count_the_keys_in_sight(tmp_path: Path) -> None:
    import torch

    window = WINDOW + 8
    base = save("qwen2", tmp_path / "base", use_sliding_window=True, sliding_window=window, max_window_layers=1)
    code = extend(base, tmp_path / "windowed", export="remote-code", skip_layers=0)
    reference = load(extend(base, tmp_path / "abf", export="abf-only").folder)
    scale_outputs(reference, "self_attn.q_proj", exact, layers=range(1))
    scale_outputs(reference, "self_attn.q_proj", lambda p: exact(min(p, window - 1)), layers=range(1, 2))
    ids = token_ids(4 * WINDOW)
    assert torch.allclose(load(code.folder, trust=True)(ids).logits, reference(ids).logits, atol=2e-5)
    assert any("sliding window" in note for note in code.patch.notes)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_neox"])
def test_static_cache_and_chunks_and_packing(family: str, exported: Any) -> None:
    import torch
    from transformers import DynamicCache

    model = load(exported(family)[0].folder, trust=True)
    ids = token_ids(3 * WINDOW)
    assert greedy(model, ids[:, :20], cache_implementation="static", disable_compile=True) == greedy(model, ids[:, :20])
    whole = model(ids).logits
    cache = DynamicCache(config=model.config)
    chunks = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(11, dim=1)]
    assert torch.allclose(torch.cat(chunks, dim=1), whole, atol=2e-5)
    other = token_ids(2 * WINDOW, seed=1)
    packed = torch.cat([ids, other], dim=1)
    positions = torch.cat([torch.arange(ids.shape[1]), torch.arange(other.shape[1])])[None]
    together = model(packed, position_ids=positions, use_cache=False).logits
    assert torch.allclose(together[:, ids.shape[1] :], model(other).logits, atol=2e-5)


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_it_compiles_without_a_break(exported: Any) -> None:
    import torch

    model = load(exported("llama")[0].folder, trust=True)
    ids = token_ids(3 * WINDOW)
    compiled = torch.compile(lambda tokens: model(tokens, use_cache=False).logits, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(ids), model(ids).logits, atol=1e-5)


def test_gradients_flow_through_the_scale(exported: Any) -> None:
    import torch

    model = load(exported("llama")[0].folder, trust=True).train().requires_grad_(True)
    ids = token_ids(2 * WINDOW)
    model(ids, labels=ids).loss.backward()
    assert torch.isfinite(model.model.layers[0].self_attn.q_proj.weight.grad).all()


def test_checkpoints_with_other_constants_live_in_one_process(exported: Any, tmp_path: Path) -> None:
    import torch

    code, _ = exported("llama")
    ids = token_ids(4 * WINDOW)
    model = load(code.folder, trust=True)
    before = model(ids).logits
    other = extend(code.base, tmp_path / "other", export="remote-code", original_length=8, skip_layers=0)
    assert not torch.allclose(load(other.folder, trust=True)(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


def test_no_way_round_the_scale(exported: Any) -> None:
    code, _ = exported("llama")
    model = load(code.folder, trust=True)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == f"regraft_entropy_abf_llama_{WINDOW}_0_eager"
    for name in ("flash_attention_2", "flex_attention", "kernels-community/flash-attn2"):
        with pytest.raises(ValueError, match="this checkpoint has sdpa and eager"):
            load(code.folder, trust=True, attn_implementation=name)


def test_it_survives_being_saved_again(exported: Any, tmp_path: Path) -> None:
    import torch

    code, _ = exported("gpt_neox")
    model = load(code.folder, trust=True)
    model.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["attn_implementation"] == code.config["attn_implementation"]
    assert config["auto_map"] == code.config["auto_map"]
    ids = token_ids(4 * WINDOW)
    assert torch.equal(load(tmp_path / "again", trust=True)(ids).logits, model(ids).logits)


def test_weights_come_with_the_eager_attention(exported: Any) -> None:
    """Entropy of attention falls where the scale acts, and is untouched where it does not."""
    import torch

    code, abf = exported("llama")
    ids = token_ids(4 * WINDOW)
    rows = []
    for folder, trust in ((code.folder, True), (abf.folder, False)):
        model = load(folder, trust=trust, attn_implementation="eager")
        weights = model(ids, output_attentions=True).attentions[0]
        assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
        rows.append(torch.special.entr(weights).sum(-1))
    scaled, plain = rows
    assert torch.equal(scaled[..., :WINDOW], plain[..., :WINDOW])
    assert (scaled[..., WINDOW:] < plain[..., WINDOW:] + 1e-6).all()


def test_the_entropys_slope_is_minus_the_variance() -> None:
    import torch

    logits = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def entropy(factor: torch.Tensor) -> torch.Tensor:
        return torch.special.entr(torch.softmax(factor * logits, -1)).sum()

    factor = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(entropy(factor), factor)
    weights = torch.softmax(1.3 * logits, -1)
    variance = (weights * logits**2).sum() - (weights * logits).sum() ** 2
    assert slope.item() == pytest.approx(-1.3 * variance.item(), abs=1e-12)


@pytest.mark.parametrize("window", [2048, 4096, 1000])
def test_the_scale_in_the_written_file(window: int) -> None:
    """The function that ends up in checkpoints, in fp32, against the closed form."""
    import torch

    (file,) = remote_code("llama", FAMILIES["llama"], window, 2).files.values()
    module: dict[str, Any] = {}
    exec(compile(file.read(), "modeling", "exec"), module)
    scale = module["entropy_scale"](torch.arange(8 * window)[None])
    assert scale.shape == (1, 1, 8 * window, 1)
    assert scale.dtype == torch.float32
    flat = scale.flatten().double()
    assert (flat[:window] == 1).all()
    assert torch.allclose(flat, torch.tensor([entropy_scale(p, window) for p in range(8 * window)]).double(), atol=3e-7)
    assert (module["entropy_scale"](torch.arange(8 * window)[None], window) == 1).all()


def test_what_is_written(exported: Any) -> None:
    code, _ = exported("qwen3")
    assert code.patch.edits == {}
    config = code.config
    assert config["auto_map"] == {"AutoModelForCausalLM": f"{MODULE}.{CLASS}"}
    assert config["architectures"] == [CLASS]
    assert config["model_type"] == "qwen3"
    assert config["attn_implementation"] == f"regraft_entropy_abf_qwen3_{WINDOW}_0_sdpa"
    text = (code.folder / f"{MODULE}.py").read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    imported = {name.partition(".")[0] for name in names}
    assert imported == {"math", "sys", "torch", "transformers"}
    assert len(text.splitlines()) < 90
    assert any("trust_remote_code" in note for note in code.patch.notes)


def test_the_paper_skips_two_layers_unless_told_otherwise(tmp_path: Path) -> None:
    checkpoint = open_folder(save("llama", tmp_path / "base"), label="base")
    patch = apply(checkpoint, export="remote-code")
    assert patch.metrics["layers_skipped"] == 2
    assert patch.json["config.json"]["attn_implementation"] == f"regraft_entropy_abf_llama_{WINDOW}_2_sdpa"
    with pytest.raises(Unsupported, match="more layers are exempt"):
        apply(checkpoint, export="remote-code", skip_layers=3)


UNTRUSTED = """
import sys
from transformers import AutoModelForCausalLM
import transformers
for options in ({}, {"trust_remote_code": False}):
    for auto in (AutoModelForCausalLM, transformers.AutoModel):
        try:
            auto.from_pretrained(sys.argv[1], **options)
        except ValueError as error:
            assert "regraft_entropy_abf" in str(error), error
            continue
        raise SystemExit("loaded without its code")
"""


def test_a_fresh_process_that_does_not_trust_the_code_is_refused(exported: Any) -> None:
    code, _ = exported("llama")
    command = [sys.executable, "-I", "-W", "ignore", "-c", UNTRUSTED, str(code.folder)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("falcon", {}, "cannot be wrapped"),
        ("gemma3", {}, "cannot be wrapped"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "model class of its own"),
        ("llama", {"attn_implementation": "mine"}, "attention implementation"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "causal language model"),
    ],
)
def test_what_cannot_be_wrapped(family: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    base = rewrite_config(save(family, tmp_path / "base"), changes)
    with pytest.raises(Unsupported, match=reason) as refusal:
        apply(open_folder(base, label="base"), export="remote-code", target_length=256)
    assert refusal.value.remedy


def test_a_tokenizers_code_may_stay(tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["tokenization_x.X", None]}
    base = rewrite_config(save("llama", tmp_path / "base"), {"auto_map": auto_map, "attn_implementation": "sdpa"})
    config = extend(base, tmp_path / "out", export="remote-code").config
    assert config["auto_map"] == {**auto_map, "AutoModelForCausalLM": f"{MODULE}.{CLASS}"}


@pytest.mark.parametrize("family", UNTESTED_HERE)
def test_the_other_families_of_the_table(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": WINDOW,
        "head_dim": 16,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    if family in ("phi", "cohere"):
        del sizes["head_dim"]
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stock.save_pretrained(tmp_path / "base")
    code = extend(tmp_path / "base", tmp_path / "code", export="remote-code", skip_layers=0)
    abf = extend(tmp_path / "base", tmp_path / "abf", export="abf-only")
    model, plain, ids = load(code.folder, trust=True), load(abf.folder), token_ids(4 * WINDOW)
    ours, theirs = model(ids).logits, plain(ids).logits
    assert torch.equal(ours[:, :WINDOW], theirs[:, :WINDOW])
    assert not torch.allclose(ours, theirs, atol=1e-3)
    assert math.isfinite(ours.abs().max().item())
    assert greedy(model, ids[:, :12]) == greedy(model, ids[:, :12], use_cache=False)
    shutil.rmtree(code.folder)
