"""Vectors from prompts: a planted direction is found, and the baked model is the hooked one."""

import json

import pytest
import torch
from safetensors.torch import load, save_file

from regraft.core.architectures import architecture_of
from regraft.core.errors import InputError, TransformationError, Unsupported, UsageError
from regraft.core.patch import overlay
from regraft.core.sources.open import open_checkpoint
from regraft.core.transformation import Run
from regraft.plugins.steer import Steer
from regraft.plugins.steer.params import SteerParams
from regraft.plugins.steer.vectors import read_vectors
from tests.core.residual.support import hook, logits
from tests.core.residual.support import load as load_model
from tests.materialise import materialise

POSITIVE = ["I love this", "what a fine day", "good", "yes, and thank you", "a joy to see"]
NEGATIVE = ["I hate this", "what a bad day!", "no", "an awful thing indeed"]


def params(**values):
    prompts = {"positive": {"prompts": POSITIVE}, "negative": {"prompts": NEGATIVE}}
    given = {key: value for key, value in {**prompts, **values}.items() if value is not None}
    return SteerParams.model_validate_json(json.dumps(given, default=str), strict=True)


def steer(folder, **values):
    """Check, plan and apply; the patch keeps the plan's word."""
    checkpoint, given, step = open_checkpoint(folder), params(**values), Steer()
    step.check(checkpoint, given)
    outline = step.plan(checkpoint, given)
    patch = step.apply(checkpoint, given, Run("steer"))
    assert outline.exact
    assert outline.deviations(patch) == []
    return checkpoint, patch


def vectors_of(patch, tmp_path):
    path, data = tmp_path / "vectors.safetensors", patch.reports["vectors.safetensors"].read()
    path.write_bytes(data)
    return path, load(data)


def tokens_of(folder, text):
    return Run("x").tokenizer(open_checkpoint(folder))(text)["input_ids"]


def bare(folder, target, change=lambda tensors: None):
    """A copy of the tiny llama whose attention and MLPs add nothing: the residual stream is the embedding."""
    base = open_checkpoint(folder)
    tensors = {name: tensor.load().clone() for name, tensor in base.tensors.items()}
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor.zero_()
    change(tensors)
    materialise(base, target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_a_planted_direction_is_found(tiny_folder, tmp_path):
    """Prompts of either set end in the same tokens; only the direction tells the sets apart."""
    direction = torch.randn(64, generator=torch.Generator().manual_seed(1))

    def plant(tensors):
        embeddings = tensors["model.embed_tokens.weight"]
        (glad,), (sad,), (plain,) = (tokens_of(tiny_folder(), one) for one in "+-x")
        embeddings[glad], embeddings[sad] = embeddings[plain] + direction, embeddings[plain] - direction

    folder = bare(tiny_folder(), tmp_path / "planted", plant)
    sets = {"positive": {"prompts": ["ab+", "c+", "+"]}, "negative": {"prompts": ["ab-", "xyz-"]}}
    _, patch = steer(folder, layers="0-", **sets)
    _, vectors = vectors_of(patch, tmp_path)
    assert set(vectors) == {"layers.0.mlp_out", "layers.1.mlp_out"}
    for vector in vectors.values():
        torch.testing.assert_close(vector, 2 * direction, rtol=1e-5, atol=1e-5)
    assert patch.metrics["mean_accuracy"] == 1.0
    assert patch.metrics["mean_cosine"] == pytest.approx(1.0)
    assert patch.metrics["mean_norm"] == pytest.approx(2 * direction.norm().item(), rel=1e-5)
    _, patch = steer(folder, layers=1, normalise="unit", **sets)
    torch.testing.assert_close(vectors_of(patch, tmp_path)[1]["layers.1.mlp_out"], direction / direction.norm())


def test_planted_heads_are_chosen(tiny_folder, tmp_path):
    """Values of one key-value head only; the outputs of its two query heads differ, all others are zero."""

    def plant(tensors):
        for layer in (0, 1):
            values = tensors[f"model.layers.{layer}.self_attn.v_proj.weight"]
            values[: 16 if layer else 32] = 0  # llama: two key-value heads of 16 rows

    folder = bare(tiny_folder(), tmp_path / "planted", plant)
    sets = {"positive": {"prompts": ["aaa", "aab", "aa"]}, "negative": {"prompts": ["zz", "zzy"]}}
    _, patch = steer(folder, site="head", heads=2, **sets)
    heads = json.loads(patch.reports["heads.json"].read())
    assert sorted(heads["heads"]) == [[1, 2], [1, 3]]
    assert heads["scoring"] == "accuracy"
    assert heads["scores"][0] == [0.5, 0.5, 0.5, 0.5], "draws"
    assert set(vectors_of(patch, tmp_path)[1]) == {"layers.1.heads.2", "layers.1.heads.3"}
    groups = json.loads(steer(folder, site="kv-group", heads=1, **sets)[1].reports["heads.json"].read())
    assert (groups["site"], groups["heads"]) == ("kv-group", [[1, 1]])
    (tmp_path / "heads.json").write_bytes(patch.reports["heads.json"].read())
    _, again = steer(folder, site="head", heads=tmp_path / "heads.json", **sets)
    assert again.reports["vectors.safetensors"].read() == patch.reports["vectors.safetensors"].read()
    (tmp_path / "heads.json").write_text(json.dumps({**heads, "num_layers": 3}))
    with pytest.raises(UsageError, match="a model of another shape"):
        steer(folder, site="head", heads=tmp_path / "heads.json", **sets)


BAKED = [
    ("llama", {"layers": "0-", "site": "residual"}),
    ("llama", {"layers": [1], "site": "attn_out", "normalise": "activation-norm"}),
    ("gemma3_text", {"layers": [0], "site": "attn_out", "position": "mean"}),
    ("qwen2", {"site": "head", "heads": 3, "normalise": "deviation", "strength": 15.0}),
    ("qwen2", {"site": "kv-group", "layers": "1"}),
    ("gpt2", {"site": "head", "heads": 2}),
    ("falcon", {"site": "residual", "layers": 0, "strength": -2.0}),
    ("phi3", {"site": "mlp_out", "layers": "-0"}),
]


@pytest.mark.parametrize(("family", "values"), BAKED)
def test_baked_is_hooked_and_the_file_gives_the_same_bytes(family, values, tiny_folder, tmp_path):
    strength = values.get("strength", 3.0)
    folder = tiny_folder(family)
    checkpoint, patch = steer(folder, **{**values, "strength": strength})
    result = overlay(checkpoint, patch, by="steer")
    path, _ = vectors_of(patch, tmp_path)

    plain = logits(load_model(folder))
    architecture = architecture_of(checkpoint.config, checkpoint.specs)
    hooked = logits(hook(load_model(folder), architecture, read_vectors(path, strength)))
    after = logits(load_model(materialise(result, tmp_path / "out")))
    assert (hooked - plain).abs().max() >= 0.5
    assert (after - hooked).abs().max() <= 1e-5

    again = SteerParams(vectors=path, strength=strength)
    reread = overlay(checkpoint, Steer().apply(checkpoint, again, Run("steer")), by="steer")
    assert reread.specs == result.specs
    assert reread.config == result.config
    for name in result.specs:
        assert torch.equal(reread.load(name).view(torch.uint8), result.load(name).view(torch.uint8)), name


def test_entropy_weighting_is_that_of_the_paper(tiny_folder, tmp_path):
    """u = Σ H_i z_i / Σ H - mean z, recomputed from the hidden states and logits of the plain model."""
    folder = tiny_folder()
    model, states, entropies, restricted = load_model(folder), [], [], []
    answers = [tokens_of(folder, one)[0] for one in "ab"]
    for text in POSITIVE:
        with torch.no_grad():
            outputs = model(torch.tensor([tokens_of(folder, text)]), output_hidden_states=True)
        states.append(outputs.hidden_states[1][0, -1].double())
        for kept, logs in ((entropies, outputs.logits[0, -1]), (restricted, outputs.logits[0, -1, answers])):
            p = logs.double().softmax(-1)
            kept.append(float(-(p * p.log()).sum()))
    z = torch.stack(states)
    for given, weights in ((None, entropies), (["a", "b"], restricted)):
        values = {"negative": None, "weighting": "entropy", "layers": 0, "answers": given}
        _, patch = steer(folder, **values)
        w = torch.tensor(weights).double()
        expected = (w / w.sum()) @ z - z.mean(0)
        found = vectors_of(patch, tmp_path)[1]["layers.0.mlp_out"]
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
        assert expected.norm() > 1e-3
        assert patch.metrics["mean_entropy"] == pytest.approx(float(w.mean()), rel=1e-4)
        assert "mean_accuracy" not in patch.metrics
        assert "separability.png" not in patch.reports
    _, both = steer(folder, weighting="entropy", layers=0)
    _, mean = steer(folder, layers=0)
    gap = vectors_of(both, tmp_path)[1]["layers.0.mlp_out"] - vectors_of(mean, tmp_path)[1]["layers.0.mlp_out"]
    w = torch.tensor(entropies).double()
    torch.testing.assert_close(gap.double(), (w / w.sum()) @ z - z.mean(0), rtol=1e-3, atol=1e-5)


def test_reports_and_metrics(tiny_folder):
    _, patch = steer(tiny_folder(), layers="0-1", site="attn_out")
    assert set(patch.reports) == {"vectors.safetensors", "steering.json", "separability.png"}
    assert patch.reports["separability.png"].read().startswith(b"\x89PNG")
    figures = json.loads(patch.reports["steering.json"].read())
    assert set(figures["places"]) == {"layers.0.attn_out", "layers.1.attn_out"}
    first = figures["places"]["layers.0.attn_out"]
    assert first["norm"] == pytest.approx(first["difference"], rel=1e-6)
    assert first["norm"] > 0
    assert 0 <= first["accuracy"] <= 1
    assert patch.metrics["vectors"] == 2
    assert (patch.metrics["positive"]["prompts"], patch.metrics["negative"]["prompts"]) == (5, 4)
    assert patch.notes[0] == "2 vectors computed from prompts added"
    assert patch.notes[1] == "5 positive prompts against 4 negative ones, at attn_out"
    _, again = steer(tiny_folder(), layers="0-1", site="attn_out")
    assert {name: file.read() for name, file in again.reports.items()} == {
        name: file.read() for name, file in patch.reports.items()
    }
    heads = steer(tiny_folder(), site="head")[1]
    assert set(heads.reports) == {"vectors.safetensors", "steering.json", "separability.png", "heads.json"}
    assert heads.metrics["vectors"] == 8


def test_bfloat16_is_close(tiny_folder, tmp_path):
    _, exact = steer(tiny_folder(), layers=1)
    _, rough = steer(tiny_folder(), layers=1, dtype="bfloat16")
    one, other = (vectors_of(patch, tmp_path)[1]["layers.1.mlp_out"] for patch in (exact, rough))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98
    assert not torch.equal(one, other)


REFUSED = {
    "no such layer": ({"layers": 2}, UsageError, "no such layers"),
    "no such head": ({"site": "head", "heads": [[1, 4]]}, UsageError, "no head 4 of layer 1"),
    "a head twice": ({"site": "head", "heads": [[1, 1], [1, 1]]}, UsageError, "named twice"),
    "too many heads": ({"site": "kv-group", "heads": 5}, UsageError, "fewer heads"),
    "no file of heads": ({"site": "head", "heads": "none.json"}, InputError, "no such file of heads"),
    "no file": ({"layers": 1, "positive": "none.txt"}, UsageError, "no such file"),
    "the same prompts": ({"layers": 1, "negative": {"prompts": POSITIVE}}, TransformationError, "do not differ"),
    "an answer of two tokens": (
        {"layers": 1, "weighting": "entropy", "answers": ["yes", "n"]}, UsageError, "no single token"),
    "an answer twice": ({"layers": 1, "weighting": "entropy", "answers": ["n", "n"]}, UsageError, "the same token"),
    "too long": ({"layers": 1, "positive": {"prompts": ["x" * 129]}}, InputError, "cannot be used: has 129 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words) as caught:
        steer(tiny_folder(), **values)
    assert caught.value.where
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("granite", {"layers": 0}),
        ("gemma2", {"layers": 0}),
        ("olmo2", {"layers": "0-"}),
        ("mixtral", {"layers": 0, "site": "mlp_out"}),
        ("qwen3", {"layers": 0, "site": "mlp_out"}),
        ("qwen2", {"layers": 0, "mode": "keep-class"}),
    ],
)
def test_models_that_cannot_are_refused_by_the_plan(family, values, tiny_folder):
    with pytest.raises(Unsupported) as caught:
        Steer().plan(open_checkpoint(tiny_folder(family)), params(**values))
    assert caught.value.remedy


def test_a_family_outside_the_table_is_tried(tiny_folder, monkeypatch):
    """What the table does not know of a derived family shows when the model runs."""
    steer(tiny_folder("starcoder2"), layers=1)
    from regraft.core.training.activations import Probe

    monkeypatch.setattr(Probe, "mlp_adds_to_residual", lambda self, layer, ids: False)
    with pytest.raises(Unsupported, match="does not take up the MLP output"):
        steer(tiny_folder("starcoder2"), layers=1)


def test_code_of_the_checkpoint_is_not_passed_over(tiny_folder, tmp_path):
    base = materialise(open_checkpoint(tiny_folder()), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "other.Model"}}))
    with pytest.raises(Unsupported, match="Python code of the checkpoint"):
        steer(base, layers=1)


def test_a_zero_vector_is_told(tiny_folder, tmp_path):
    """Values of the lower layer are zero: its heads put out nothing, whatever the prompt."""

    def plant(tensors):
        tensors["model.layers.0.self_attn.v_proj.weight"].zero_()

    folder = bare(tiny_folder(), tmp_path / "zero", plant)
    _, patch = steer(folder, site="head", normalise="unit")
    assert "the prompts do not differ at 4 places, such as layers.0.heads.0: zero vectors" in patch.notes
    assert isinstance(patch.metrics["mean_norm"], float)


def test_vectors_are_taken_at_the_model_below_the_step(tiny_folder, tmp_path):
    """A second step sees what the first one made of the model."""
    checkpoint, first = steer(tiny_folder(), layers=0, strength=2.0)
    above = overlay(checkpoint, first, by="first")
    second = Steer().apply(above, params(layers=1), Run("second"))
    _, alone = steer(tiny_folder(), layers=1)
    one, other = (vectors_of(patch, tmp_path)[1]["layers.1.mlp_out"] for patch in (second, alone))
    assert (one - other).abs().max() > 1e-3
