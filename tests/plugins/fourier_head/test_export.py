"""The written checkpoint, through its own code: text as before, numbers a density, everything that users call."""

import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from regraft.core.portable_code import prove
from regraft.core.transformation import Run
from regraft.core.verify.structure import check_structure
from regraft.plugins.fourier_head import math as fm
from regraft.plugins.fourier_head import regraft_architectures
from regraft.plugins.fourier_head.families import FAMILIES
from regraft.plugins.fourier_head.grid import Grid
from tests.families import save_tiny
from tests.materialise import materialise
from tests.plugins.fourier_head.support import (
    BINS,
    START,
    applied,
    base,
    change_json,
    export,
    load,
    opened,
    stock,
    token_ids,
)

TEXT = torch.ones(128, dtype=torch.bool)
TEXT[START : START + BINS] = False
TIED = {"tie_word_embeddings": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The base and the model with the head, of a family and options, made once."""
    cache = {}

    def make(family="llama", options=(), **values):
        key = (family, tuple(options), *sorted(values.items()))
        if key not in cache:
            folder = tmp_path_factory.mktemp("export")
            before = base(folder / "base", family, **dict(options))
            cache[key] = before, export(before, folder / "out", **values)
        return cache[key]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_text_logits(family, made):
    """Bit for bit here, softcaps and scales of logits included; the structure check knows every tensor."""
    before, model = made(family)
    with torch.no_grad():
        old, new = stock(before)(token_ids()).logits, model(token_ids()).logits
    assert (new - old)[..., TEXT].abs().max() < 1e-5
    assert new.dtype == torch.float32
    numbers = new[..., ~TEXT].log_softmax(-1)
    states = model.base_model(token_ids()).last_hidden_state
    expected = Grid(BINS).log_masses(model.lm_head.fourier(states).flatten(0, 1), floor=5e-4)
    assert torch.allclose(numbers.flatten(0, 1), expected, atol=1e-5)
    findings = check_structure(opened(model.name_or_path), regraft_architectures())
    assert findings == [], [str(finding) for finding in findings]


@pytest.mark.parametrize("values", [{"mode": "hybrid"}, {"gate": "keep_rows"}, {"untie": True}])
@pytest.mark.parametrize("options", [(), tuple(TIED.items())])
def test_the_gate_keeps_the_mass_of_numbers(values, options, made):
    before, model = made("llama", options, **values)
    with torch.no_grad():
        old, new = stock(before)(token_ids()).logits, model(token_ids()).logits
    assert (new - old)[..., TEXT].abs().max() < 1e-5
    mass, was = (logits.softmax(-1)[..., ~TEXT].sum(-1) for logits in (new, old))
    if "gate" in values:
        assert torch.allclose(mass, was, atol=1e-6)
    else:  # to first order: these rows are random, which is the worst case
        assert 0.4 < mass.mean() / was.mean() < 1.1
    stored = dict(model.named_parameters())
    assert ("lm_head.weight" in stored) == (not options or "untie" in values)
    assert model.config.tie_word_embeddings == (bool(options) and "untie" not in values)


def test_small_rows_keep_the_mass_to_second_order(tmp_path):
    """The linear gate is off by half the variance of the bins' logits: rows half as long are off by a quarter."""
    from safetensors.torch import load_file, save_file

    gaps = []
    for number, factor in enumerate((1.0, 0.5)):
        folder = tmp_path / str(number)
        save_tiny("llama", folder, tokenizer=True)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"][START : START + BINS] *= factor
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        before = opened(folder)
        model = export(before, folder / "out")
        with torch.no_grad():
            old, new = stock(before)(token_ids()).logits, model(token_ids()).logits
        gaps.append((old[..., ~TEXT].logsumexp(-1) - new[..., ~TEXT].logsumexp(-1)).abs().mean().item())
    assert gaps[1] < 0.3 * gaps[0]


def test_loss_gradient_and_saving_again(made, tmp_path):
    _, model = made()
    ids = token_ids()
    labels = ids.clone()
    labels[:, :4] = -100
    outputs = model.train()(ids, labels=labels)
    expected = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(outputs.loss, expected)
    model.requires_grad_(True)
    model(ids, labels=labels).loss.backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in model.parameters())
    model.zero_grad()
    model.requires_grad_(False).eval().save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="change the vocabulary before"):
        model.resize_token_embeddings(200)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_saved_again_it_computes_the_same(family, made, tmp_path):
    """Softcap and scale stand in the head's settings, not in the stock class's, after the first saving too."""
    _, model = made(family)
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(token_ids()).logits, model(token_ids()).logits)


def test_generation_beams_and_cache(made):
    _, model = made()
    ids = token_ids(2, 8)
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    greedy = model.generate(ids, do_sample=False, **options)
    assert torch.equal(greedy, model.generate(ids, do_sample=False, use_cache=False, **options))
    step = model(greedy[:, :-1]).logits.argmax(-1)[:, 7:]
    assert torch.equal(step, greedy[:, 8:])
    torch.manual_seed(0)
    assert model.generate(ids, do_sample=True, **options).shape == (2, 14)
    beams = model.generate(ids, num_beams=3, **options)
    assert score(model, beams, 8) >= score(model, greedy, 8) - 1e-4


def score(model, ids, start):
    logs = model(ids[:, :-1]).logits.log_softmax(-1)
    return logs.gather(-1, ids[:, 1:, None])[:, start - 1 :, 0].sum()


def test_choosing_in_two_stages(made):
    """Numbers that are the likeliest choice together, though each bin is less likely than a word."""
    _, model = made()
    processor = sys.modules[type(model).__module__].NumbersAsOne
    scores = torch.full((1, 128), -20.0)
    scores[0, START : START + BINS] = torch.log(torch.tensor([0.04] * 5 + [0.1] + [0.075] * 4))
    scores[0, 5], scores[0, 120] = math.log(0.3), math.log(0.1)
    assert scores.argmax().item() == 5
    greedy = processor(model)(None, scores)
    assert greedy.argmax().item() == START + 5
    assert greedy[:, TEXT].max() == -math.inf
    top = processor(model, do_sample=True, top_p=0.5)(None, scores).softmax(-1)
    assert top[:, ~TEXT].sum().item() == pytest.approx(1)
    assert torch.allclose(top[0, ~TEXT], scores[0, ~TEXT].softmax(-1), atol=1e-6)
    two = processor(model, do_sample=True, top_k=2)(None, scores).softmax(-1)[0]
    assert two[120] == 0
    assert two[5].item() == pytest.approx(0.3 / 0.9, abs=1e-5)
    warm = processor(model, do_sample=True, temperature=2.0)(None, scores).softmax(-1)[0]
    assert (warm[~TEXT].sum() / warm[5]).item() == pytest.approx((0.6 / 0.3) ** 0.5, abs=1e-4)
    assert torch.allclose(warm[~TEXT] / warm[~TEXT].sum(), scores[0, ~TEXT].softmax(-1), atol=1e-6)
    with pytest.raises(ValueError, match="top_p"):
        processor(model, top_p=0.0)
    ids = model.generate(token_ids(2, 8), logits_processor=[processor(model)], do_sample=False, max_new_tokens=3,
                         pad_token_id=0)  # fmt: skip
    assert ids.shape == (2, 11)


@pytest.mark.parametrize(
    "values",
    [
        {"mode": "hybrid"},
        {"quadrature": "exact"},
        {"margin": 0.2},
        {"coordinate": "values", "margin": 0.1},
        {"coordinate": "values", "values": (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)},
    ],
)
def test_densities_are_those_of_the_library(values, made):
    """The code in the checkpoint and our maths: masses, mean, quantile, in the units of the values."""
    _, model = made("llama", **values)
    ids = token_ids()
    found = model.density(ids)
    u = found.coefficients.double()
    block = model.config.fourier_head
    edges = block.get("edges")
    grid = Grid(BINS, block["quadrature"], block["margin"], None if edges is None else tuple(edges))
    masses = grid.log_masses(u, floor=5e-4)
    assert torch.allclose(found.log_masses().double(), masses, atol=1e-5)
    assert torch.allclose(model(ids).logits[:, -1, ~TEXT].log_softmax(-1).double(), masses, atol=1e-5)
    low, high = block["range"]
    edge = 1 - block["margin"]
    fine = (torch.arange(4000, dtype=torch.float64) + 0.5) / 2000 - 1
    weights = fm.density(u, fine * edge)
    weights = weights / weights.sum(1, keepdim=True)
    points = low + (fine + 1) / 2 * (high - low)
    assert torch.allclose(found.mean().double(), (weights * points).sum(1), atol=2e-5 * (high - low))
    middle = found.quantile(0.5).double()
    below = (weights * (points < middle[:, None])).sum(1)
    assert (below - 0.5).abs().max() < 2e-3
    drawn = found.sample(torch.Generator().manual_seed(0))
    assert ((drawn >= low) & (drawn <= high)).all()


def test_replace_is_a_density_of_the_whole_vocabulary(made):
    for options in ((), tuple(TIED.items())):
        _, model = made("llama", options, mode="replace")
        logits = model(token_ids()).logits
        assert logits.exp().sum(-1).sub(1).abs().max() < 1e-5
        assert [name for name, _ in model.named_parameters() if name.startswith("lm_head")] == [
            "lm_head.fourier.weight",
            "lm_head.fourier.bias",
        ]
        findings = check_structure(opened(model.name_or_path), regraft_architectures())
        assert findings == [], [str(finding) for finding in findings]


@pytest.mark.parametrize("options", [{}, TIED])
def test_appended_bins(options, tmp_path):
    before = base(tmp_path / "base", **options)
    after, patch = applied(before, bins=40, range=(0.0, 8.0), num_frequencies=6)
    folder = materialise(after, tmp_path / "out")
    model, tokenizer = load(folder), Run("new").tokenizer(after)
    start = 99  # behind the tokenizer's last id; the embeddings had padding rows up to 128
    assert tokenizer.convert_tokens_to_ids(["<bin_0>", "<bin_39>"]) == [start, start + 39]
    assert tokenizer("a<bin_7>b")["input_ids"][1] == start + 7
    assert tokenizer.decode([start + 7]) == "<bin_7>"
    assert model.config.vocab_size == 139
    with torch.no_grad():
        old, new = stock(before)(token_ids()).logits, model(token_ids()).logits
    assert new.shape[-1] == 139
    assert (new - old.new_zeros(()))[..., :start].sub(old[..., :start]).abs().max() < 1e-5
    assert new[..., start:].diff(dim=-1).abs().max() < 1e-6, "a new density is uniform"
    assert torch.allclose(model.density(token_ids()).mean(), torch.tensor(4.0))
    rows = model.get_input_embeddings().weight[start:]
    gaps = torch.cdist(rows, rows)
    assert gaps.diagonal(1).max() < gaps.max() / 3, "neighbours are alike"
    findings = check_structure(opened(folder), regraft_architectures())
    assert findings == [], [str(finding) for finding in findings]
    assert patch.metrics["bins"] == 40


def test_it_needs_its_code_and_nothing_else(tmp_path):
    """Loads and computes in a process where regraft cannot be imported; refuses without trust, tied or not."""
    for name, options in (("untied", {}), ("tied", TIED)):
        before = base(tmp_path / name, **options)
        folder = materialise(applied(before)[0], tmp_path / f"{name}-out")
        if name == "untied":
            proof = prove(folder)
            assert proof.ok, proof.error
            assert proof.report["class"] == "FourierHeadForCausalLM"
        program = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
        command = [sys.executable, "-c", program, str(folder)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "trust_remote_code" in done.stderr


def test_weights_of_the_reference_code_come_by_name(tmp_path):
    from safetensors.torch import save_file

    before = base(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(10, 64, generator=generator), torch.randn(10, generator=generator)
    names = {
        "head.fc_extract_autocorrelation_params.weight": weight,
        "head.fc_extract_autocorrelation_params.bias": bias,
    }
    save_file(names, tmp_path / "head.safetensors")
    after, _ = applied(before, weights=tmp_path / "head.safetensors")
    assert torch.equal(after.load("lm_head.fourier.weight"), weight)
    assert torch.equal(after.load("lm_head.fourier.bias"), bias)


def test_dtype_and_bytes_of_the_base_stay(tmp_path):
    before = base(tmp_path / "base", dtype=torch.bfloat16)
    after, _ = applied(before)
    assert {spec.dtype for spec in after.specs.values()} == {"BF16"}
    kept = [name for name in before.specs if not name.startswith("lm_head")]
    assert all(after.raw(name) == before.raw(name) is not None for name in kept)
    text = torch.cat([before.load("lm_head.weight")[:START], before.load("lm_head.weight")[START + BINS :]])
    assert torch.equal(after.load("lm_head.weight"), text)
    model = load(materialise(after, tmp_path / "out"), dtype="auto")
    logits = model(token_ids()).logits
    assert logits.dtype == torch.float32
    assert logits[..., ~TEXT].logsumexp(-1).isfinite().all()


def test_the_same_run_gives_the_same_bytes(tmp_path):
    before = base(tmp_path / "base")
    for values in ({"init": "upstream"}, {"bins": 40}):
        one, other = (applied(before, Run("head", seed=3), **values)[0] for _ in range(2))
        assert all(torch.equal(one.load(name), other.load(name)) for name in one.specs)
        assert one.files["config.json"].read() == other.files["config.json"].read()
    config = json.loads(one.files["config.json"].read())
    assert config["fourier_head"]["start"] == 99


def test_a_broken_block_is_found(tmp_path):
    before = base(tmp_path / "base")
    folder = materialise(applied(before)[0], tmp_path / "out")
    block = json.loads((folder / "config.json").read_text())["fourier_head"]
    change_json(folder, "config.json", fourier_head={**block, "bins": 12})
    findings = check_structure(opened(folder), regraft_architectures())
    assert any("lm_head.weight" in finding.where and finding.fatal for finding in findings)
