"""Training: losses in parts equal the model's own, the head learns, and what is frozen keeps its bytes."""

import json

import pytest
import torch
from torch.nn import functional as F

from regraft.core.data.batches import collate
from regraft.core.data.examples import IGNORED, Example, ints
from regraft.core.data.rows import Place
from regraft.core.errors import InputError, UsageError
from regraft.core.patch import overlay
from regraft.core.training.footprint import shared_bytes
from regraft.core.training.sharding import sharable
from regraft.core.transformation import Run
from regraft.plugins.fourier_head import FourierHead
from regraft.plugins.fourier_head import fit as fitting
from regraft.plugins.fourier_head.adapters import places
from regraft.plugins.fourier_head.export import Aim
from regraft.plugins.fourier_head.loss import FollowLoss, Learner, TokenLoss
from regraft.plugins.fourier_head.math import normalised_penalty
from regraft.plugins.fourier_head.values import grid_of
from tests.plugins.fourier_head.support import BINS, START, applied, base, params, planned

CASES = {
    "linear gate": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "kept rows": ("llama", {}, {"gate": "keep_rows"}),
    "kept rows, tied, softcap": ("gemma2", {"final_logit_softcapping": 2.0}, {"gate": "keep_rows"}),
    "softcap": ("gemma2", {"final_logit_softcapping": 2.0, "tie_word_embeddings": False}, {}),
    "scale": ("granite", {}, {"quadrature": "exact"}),
    "replace": ("llama", {}, {"mode": "replace"}),
    "appended, with a margin": ("llama", {}, {"bins": 12, "margin": 0.1}),
}


def batch_of(rows=3, length=14, highest=98):
    """Sequences, half of whose tokens are digits, of unequal length; the first five tokens are a prompt."""
    generator = torch.Generator().manual_seed(5)
    sequences = []
    for number in range(rows):
        ids = torch.randint(4, highest, (length - number,), generator=generator)
        ids[::2] = torch.randint(START, START + BINS, ids[::2].shape, generator=generator)
        labels = [IGNORED] * 5 + ids[5:].tolist()
        sequences.append(Example(ints(ids.tolist()), ints(labels), Place("a", number)))
    return collate(sequences, tuple(range(rows)))


def learner_of(folder, family, options, values):
    before = base(folder, family, **options)
    after, _ = applied(before, **values)
    model = Run("head").model(after, trust_remote_code=True)
    with torch.no_grad():  # away from the start, where the appended bins are uniform
        for name, parameter in model.named_parameters():
            if "fourier" in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    given = params(**values)
    return before, Learner(model.requires_grad_(True), grid_of(Aim.of(before, given), given))


@pytest.mark.parametrize("case", CASES)
def test_the_loss_in_parts_is_the_cross_entropy_of_the_logits(case, tmp_path):
    """Values, and the gradient of every weight; though no logits of bins or of the vocabulary are made."""
    family, options, values = CASES[case]
    _, learner = learner_of(tmp_path / "base", family, options, values)
    batch = batch_of(highest=99 + 12 if "bins" in values else 98)
    ours, figures = TokenLoss(learner)(batch)
    logits = learner.model(batch.input_ids).logits[:, :-1].flatten(0, 1)
    labels = batch.labels[:, 1:].flatten()
    plain = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    assert (figures["number_nll"] + figures["text_nll"]).item() == pytest.approx(ours.item(), rel=1e-5)
    head = learner.head
    assert figures["numbers"] == ((labels >= head.start) & (labels < head.start + head.bins)).sum()
    weights = dict(learner.model.named_parameters())
    expected = torch.autograd.grad(plain, list(weights.values()), allow_unused=True)
    found = torch.autograd.grad(ours, list(weights.values()), allow_unused=True)
    for name, one, other in zip(weights, found, expected, strict=True):
        if other is not None and other.abs().max() > 0:
            assert one is not None, name
            assert (one - other).norm() < 1e-4 * other.norm() + 1e-5, name


@pytest.mark.parametrize("kind", ["upstream", "normalized"])
def test_the_penalty_is_on_the_densities_of_bins(kind, tmp_path):
    _, learner = learner_of(tmp_path / "base", "llama", {}, {})
    batch = batch_of()
    plain, _ = TokenLoss(learner)(batch)
    loss, figures = TokenLoss(learner, kind, 0.01)(batch)
    assert loss > plain
    if kind == "normalized":
        states, labels = learner.states(batch)
        numeric = (labels >= START) & (labels < START + BINS)
        penalty = normalised_penalty(learner.head.fourier(states[numeric]))
        assert (loss - plain).item() == pytest.approx(0.01 * figures["numbers"].item() * penalty.item(), rel=1e-3)


def test_following_is_the_divergence_from_the_old_head(tmp_path):
    before, learner = learner_of(tmp_path / "base", "llama", {}, {})
    batch = batch_of()
    rows = before.load("lm_head.weight")[START : START + BINS]
    ours, figures = FollowLoss(learner, rows)(batch)
    counted = (batch.labels[:, 1:] != IGNORED).flatten()
    old = Run("before").model(before)(batch.input_ids).logits[:, :-1].flatten(0, 1)[counted].log_softmax(-1)
    new = learner.model(batch.input_ids).logits[:, :-1].flatten(0, 1)[counted].log_softmax(-1)
    number = slice(START, START + BINS)
    shares = [logs[:, number].exp().sum(1) for logs in (old, new)]
    gate = shares[0] * (shares[0] / shares[1]).log() + (1 - shares[0]) * ((1 - shares[0]) / (1 - shares[1])).log()
    inside = [logs[:, number].log_softmax(1) for logs in (old, new)]
    bins = (inside[0].exp() * (inside[0] - inside[1])).sum(1)
    assert figures["gate_kl"].item() == pytest.approx(gate.sum().item(), rel=1e-3)
    assert figures["bins_kl"].item() == pytest.approx(bins.sum().item(), rel=1e-4)
    ours.backward()
    assert learner.head.fourier.weight.grad.abs().max() > 0


@pytest.fixture
def data(tmp_path):
    """Sums of two digits that stay below ten, asked in text and answered by a digit."""
    file = tmp_path / "sums.jsonl"
    pairs = [(one, other) for one in range(10) for other in range(10 - one)]
    rows = [{"prompt": f"{one}+{other}=", "completion": f"{one + other}"} for one, other in pairs]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_calibrating_and_training_the_head(data, tmp_path):
    before = base(tmp_path / "base")
    run = Run("head", seed=0, state=tmp_path / "state")
    start = {"init": "uniform", "num_frequencies": 8}
    learn = {"data": {"source": data, "learn": "all"}, "epochs": 4, "batch_size": 10, "lr": 0.01, "held_out": 0.2}
    trained = {**learn, "data": data, "epochs": 8, "regularizer": "normalized"}
    after, patch = applied(before, run, calibrate=learn, train=trained, **start)
    calibrated, taught = patch.metrics["calibrate"], patch.metrics["train"]
    assert calibrated["held_out_after"]["bins_kl"] < 0.7 * calibrated["held_out_before"]["bins_kl"]
    assert calibrated["held_out_after"]["gate_kl"] < calibrated["held_out_before"]["gate_kl"]
    assert taught["held_out_after"]["number_nll"] < taught["held_out_before"]["number_nll"]
    assert taught["data"]["files"].keys() == {"sums.jsonl"}
    assert set(patch.reports) == {
        f"{stage}-loss{end}" for stage in ("calibrate", "train") for end in (".png", "es.jsonl")
    }
    kept = [name for name in after.specs if "gate" not in name and "fourier" not in name]
    assert all(torch.equal(after.load(name), applied(before, **start)[0].load(name)) for name in kept)
    assert any(after.raw(name) is not None for name in kept)
    assert patch.metrics["changed_tensors"] == 4
    json.dumps(dict(patch.metrics), allow_nan=False)
    again, _ = applied(before, Run("head", seed=0), calibrate=learn, train=trained, **start)
    assert all(torch.equal(again.load(name), after.load(name)) for name in after.specs)


def test_training_everything(data, tmp_path):
    before = base(tmp_path / "base", tie_word_embeddings=True)
    learn = {"data": data, "weights": "full", "epochs": 3, "batch_size": 10, "lr": 3e-3}
    after, patch = applied(before, train=learn)
    assert patch.metrics["changed_tensors"] == len(after.specs)
    figures = patch.metrics["train"]
    assert figures["final_loss"] < figures["first_loss"]
    model = Run("head").model(after, trust_remote_code=True)
    assert model(torch.tensor([[20, 21]])).logits.isfinite().all()


def test_the_plan_knows_what_two_processes_share_out(data, tmp_path, monkeypatch):
    """All that learns but the gate, which is a single row; of two stages the one that is not shared out counts too."""
    before, given = base(tmp_path / "base"), []
    monkeypatch.setattr(fitting, "train", lambda *values, **_: given.extend(values) or 1 / 0)
    full, head = {"data": data, "weights": "full"}, {"data": data, "micro_batch": 500, "batch_size": 500}
    with pytest.raises(ZeroDivisionError):
        applied(before, train=full)
    model, *_, learns = given
    numbers = sum(one.parameter.numel() for one in sharable(model, learns, 2).values())
    gate = before.config["hidden_size"] + 1
    assert planned(before, train=full).shared_bytes == shared_bytes(numbers + gate)
    alone, both = planned(before, calibrate=head), planned(before, calibrate=head, train=full)
    assert alone.shared_bytes == 0
    assert both.workspace_bytes - both.shared_bytes == alone.workspace_bytes


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_adapters_of_attention(family, data, tmp_path, monkeypatch):
    """Separate, fused and transposed projections: what is stored computes what was measured at the end."""
    before, measured = base(tmp_path / "base", family), fitting._measured
    calls = []
    monkeypatch.setattr(fitting, "_measured", lambda *given: calls.append(given) or measured(*given))
    learn = {"data": data, "weights": "lora", "rank": 2, "epochs": 4, "batch_size": 10, "lr": 0.01, "held_out": 0.2}
    learn["precision"] = "float32"  # bfloat16 would round adapters and merged weights differently
    after, patch = applied(before, train=learn)
    figures = patch.metrics["train"]
    assert figures["held_out_after"]["loss"] < figures["held_out_before"]["loss"]
    (start, _), aim = applied(before), Aim.of(before, params())
    adapted = places(aim.architecture)
    for name in adapted:
        delta = (after.load(name) - start.load(name)).double()
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 2, name
    changed = {name for name in after.specs if not torch.equal(after.load(name), start.load(name))}
    assert changed == {
        *adapted,
        *(name for name in after.specs if name.startswith(("lm_head.gate", "lm_head.fourier"))),
    }
    stored = TokenLoss(Learner(Run("after").model(after, trust_remote_code=True), grid_of(aim, params())))
    loss = measured(stored, *calls[0][1:])["loss"]
    assert loss == pytest.approx(figures["held_out_after"]["loss"], rel=1e-4)


def test_an_interrupted_training_goes_on(data, tmp_path, monkeypatch):
    before = base(tmp_path / "base")
    learn = {"data": data, "epochs": 2, "batch_size": 10, "lr": 0.01}
    whole, _ = applied(before, train=learn)
    calls, loss = [], TokenLoss.__call__

    def failing(self, batch):
        calls.append(batch)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return loss(self, batch)

    monkeypatch.setattr(TokenLoss, "__call__", failing)
    step, given = FourierHead(), params(train={**learn, "log": tmp_path / "log.jsonl"})
    with pytest.raises(KeyboardInterrupt):
        step.apply(before, given, Run("head", state=tmp_path / "state"))
    monkeypatch.undo()
    patch = step.apply(before, given, Run("head", state=tmp_path / "state"))
    after = overlay(before, patch, by="head")
    assert all(torch.equal(whole.load(name), after.load(name)) for name in after.specs)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) >= patch.metrics["train"]["steps"]


def test_data_that_teaches_nothing(tmp_path):
    before = base(tmp_path / "base")
    pairs, short = tmp_path / "pairs.jsonl", tmp_path / "short.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    short.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    for file, kind, words in ((pairs, UsageError, "preference pairs"), (short, InputError, "fewer sequences")):
        with pytest.raises(kind, match=words):
            applied(before, train={"data": str(file), "batch_size": 1 if file is pairs else 4})
    with pytest.raises(UsageError, match="no such file"):
        applied(before, train={"data": str(tmp_path / "none.jsonl")})
