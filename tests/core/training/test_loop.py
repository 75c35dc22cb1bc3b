"""What the loop promises: exact steps, equal pieces, only what is selected, and a clear end when it goes wrong."""

import copy
import hashlib
import math

import pytest
import torch

from regraft.core.data.batches import Batches
from regraft.core.errors import TransformationError, Unsupported, UsageError
from regraft.core.training import modes
from regraft.core.training.head import Head
from regraft.core.training.loop import Records
from regraft.core.training.modes import bf16_is_fast, resolve_precision, without_dropout
from regraft.core.training.objectives import CrossEntropy
from regraft.core.training.settings import TrainSettings
from regraft.core.training.weights import Trainable, Weights, select
from tests.checkpoints import bits, same_bits
from tests.core.training.support import batches, fit, model_of, sequence, sequences, values
from tests.families import tiny

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def model(llama):
    return model_of(llama)


def close(one, other, atol=1e-6):
    return all((one[name] - other[name]).abs().max() <= atol for name in one)


@pytest.mark.parametrize("examples", [sequences(8), [sequence(5 + n, n, n % 3) for n in range(8)]])
def test_pieces_of_a_step_add_up(llama, examples):
    """Oracle 16: two pieces of four are one of eight, of whatever lengths."""
    runs = []
    for micro in (None, 4, 3):
        model = model_of(llama)
        report = fit(model, batches(examples, batch_size=8, micro_batch=micro, epochs=3), optimizer="spam", lr=1e-3)
        runs.append((report.losses, values(model)))
    for losses, weights in runs[1:]:
        assert losses == pytest.approx(runs[0][0], abs=1e-5)
        assert close(weights, runs[0][1], 1e-5)
    assert runs[0][0][-1] < runs[0][0][0]


def test_first_loss_is_the_mean_over_learnt_tokens(model):
    examples = [sequence(5 + n, n, 2) for n in range(4)]
    report = fit(copy.deepcopy(model), batches(examples, batch_size=4))
    data = batches(examples, batch_size=4)
    (batch,) = data.micro(0)
    expected = Head.of(model, fused=False).label_losses(batch) / sum(one.learnt for one in examples)
    assert report.losses == pytest.approx([expected.item()], rel=1e-6)


def test_hundred_samples_make_six_steps(model):
    report = fit(model, batches(sequences(100, 4), batch_size=32, epochs=2), names=["model.norm.weight"])
    assert report.steps == report.planned == len(report.losses) == 6
    assert report.tokens == 6 * 32 * 4
    assert report.stopped == ""


def test_same_seed_same_bytes(llama):
    """Oracle 18."""
    runs = []
    for seed in (0, 0, 1):
        model = model_of(llama)
        fit(model, batches(sequences(16), batch_size=4, epochs=2, seed=seed))
        runs.append(values(model))
    assert same_bits(runs[0], runs[1])
    assert not same_bits(runs[0], runs[2])


def test_random_numbers_of_the_caller_are_left_alone(model):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(model, batches(sequences(8)), names=["model.norm.weight"])
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_rate_of_zero_changes_no_byte(model):
    """Oracle 14."""
    before = values(model)
    fit(model, batches(sequences(8)), lr=0.0, weight_decay=0.5)
    assert same_bits(values(model), before)


def test_only_what_is_named_learns(model):
    """Oracle 7."""
    before = values(model)
    asking = []

    class Watching(CrossEntropy):
        def __call__(self, batch):
            asking.append([name for name, one in model.named_parameters() if one.requires_grad])
            return super().__call__(batch)

    fit(model, batches(sequences(8)), names=[Q_PROJ], objective=Watching(Head.of(model)))
    assert asking == [[Q_PROJ]]
    after = values(model)
    assert [name for name in before if bits(before[name]) != bits(after[name])] == [Q_PROJ]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert not model.training


def test_a_slice_learns_and_the_rest_keeps_its_bytes(model):
    before, rows = values(model), tuple(range(16, 32))
    one = Trainable(model.get_parameter(Q_PROJ), rows)
    fit(model, batches(sequences(16), batch_size=8), trainable={"head 1": one}, weight_decay=0.1)
    after = values(model)
    assert [name for name in before if bits(before[name]) != bits(after[name])] == [Q_PROJ]
    assert bits(before[Q_PROJ][:16]) == bits(after[Q_PROJ][:16])
    assert bits(before[Q_PROJ][32:]) == bits(after[Q_PROJ][32:])
    assert (before[Q_PROJ][16:32] != after[Q_PROJ][16:32]).all()


def test_a_parameter_outside_the_model_learns(model):
    bias = torch.nn.Parameter(torch.zeros(64))
    hook = model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda module, given, output: output + bias)
    before = values(model)
    report = fit(model, batches(sequences(8), epochs=10), trainable={"bias": Trainable(bias)}, lr=0.05)
    hook.remove()
    assert report.final_loss < report.losses[0] - 0.1
    assert same_bits(values(model), before)
    assert bias.abs().min() > 0


def test_penalty_joins_the_loss(llama):
    losses = []
    for weight in (0.0, 3.0):
        model = model_of(llama)
        norm = model.model.norm.weight
        report = fit(model, batches(sequences(8)), names=["model.norm.weight"],
                     penalty=lambda norm=norm, weight=weight: weight * norm.abs().sum())  # fmt: skip
        losses.append(report.losses[0])
    expected = 3 * model_of(llama).model.norm.weight.abs().sum().item()
    assert losses[1] - losses[0] == pytest.approx(expected, rel=1e-5)


def test_average_is_the_result(llama):
    weights = {}
    for ema in (None, 0.0, 0.9):
        model = model_of(llama)
        fit(model, batches(sequences(8), epochs=4), ema=ema, names=[Q_PROJ])
        weights[ema] = model.get_parameter(Q_PROJ).detach().clone()
    start = model_of(llama).get_parameter(Q_PROJ)
    assert torch.equal(weights[0.0], weights[None])
    assert (weights[0.9] - start).norm() < 0.5 * (weights[None] - start).norm()


def test_weights_decay_only_in_matrices(llama):
    model = model_of(llama)
    before = values(model)
    fit(model, batches(sequences(8, 4), steps=1), weight_decay=0.5, lr=1e-2, clip_norm=1e-20, eps=1.0)
    after = values(model)
    shrunk = before[Q_PROJ] * (1 - 1e-2 * 0.5)
    torch.testing.assert_close(after[Q_PROJ], shrunk, rtol=0, atol=1e-7)
    torch.testing.assert_close(after["model.norm.weight"], before["model.norm.weight"], rtol=0, atol=1e-7)


def test_gradients_are_clipped(llama):
    seen = []
    for clip in (None, 0.01):
        model = model_of(llama)
        fit(model, batches(sequences(8), steps=1), clip_norm=clip, eps=1e3, lr=1.0, records=Records(listen=seen.append))
        moved = {name: one - model_of(llama).get_parameter(name) for name, one in model.named_parameters()}
        norm = math.sqrt(sum(float(one.square().sum()) for one in moved.values()))
        expected = (seen[-1].gradient_norm if clip is None else clip) / 1e3  # Adam's first step is g / (|g| + eps)
        assert norm == pytest.approx(expected, rel=0.02)
    assert seen[0].gradient_norm == seen[1].gradient_norm > 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "spam"])
def test_every_optimiser_learns(llama, optimizer):
    model = model_of(llama)
    report = fit(model, batches(sequences(8), epochs=25), optimizer=optimizer, lr=3e-3, schedule="cosine")
    assert report.final_loss < 0.5 * report.losses[0]


def test_eight_bit_moments(llama):
    model = model_of(llama)
    weights = Weights(select(model))
    from regraft.core.training.optimisers import make_optimizer

    optimizer = make_optimizer(TrainSettings(optimizer="adamw-8bit", weight_decay=0.1), weights)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for leaf in weights.leaves.values():
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    kinds = {one["state1"].dtype for leaf, one in optimizer.state.items() if leaf.numel() >= 4096}
    assert kinds == {torch.uint8}


def test_early_stop_on_loss(llama):
    data = batches(sequences(8), epochs=200)
    report = fit(model_of(llama), data, lr=3e-3, stop_loss=1.0)
    assert report.stopped == "stop_loss"
    assert report.final_loss < 1.0 <= min(report.losses[:-1])
    wide = fit(model_of(llama), data, lr=3e-3, stop_loss=1.0, stop_window=5)
    assert wide.steps > report.steps
    assert sum(wide.losses[-5:]) / 5 < 1.0 <= sum(wide.losses[-6:-1]) / 5


def test_loss_that_is_not_finite(model, llama, tmp_path):
    """The step is not taken, its rows are named, and the weights before it are kept."""
    examples = sequences(8)
    poisoned = examples[3].place.number

    class Poisoned(CrossEntropy):
        def __call__(self, batch):
            loss, figures = super().__call__(batch)
            return (loss * math.nan if 3 in batch.indices else loss), figures

    data = batches(examples, batch_size=2, shuffle=False)
    records = Records(state=tmp_path / "state")
    with pytest.raises(TransformationError, match="the loss is not finite") as caught:
        fit(model, data, objective=Poisoned(Head.of(model)), records=records)
    assert caught.value.where == f"step 2, rows data.jsonl:{poisoned - 1}, data.jsonl:{poisoned}"
    assert "nan" in caught.value.found
    assert "after step 1 are kept" in caught.value.found
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-00000001"]
    one_step = model_of(llama)
    fit(one_step, batches(examples, batch_size=2, shuffle=False, steps=1))
    assert same_bits(values(model), values(one_step))


def test_gradient_that_is_not_finite(model):
    before = values(model)

    class Steep(CrossEntropy):
        def __call__(self, batch):
            loss, figures = super().__call__(batch)
            return loss + (model.model.norm.weight - model.model.norm.weight.detach()).abs().sqrt().sum(), figures

    with pytest.raises(TransformationError, match="the gradient is not finite"):
        fit(model, batches(sequences(8)), objective=Steep(Head.of(model)))
    assert same_bits(values(model), before)


def test_penalty_that_is_not_finite(model):
    with pytest.raises(TransformationError, match="not finite") as caught:
        fit(model, batches(sequences(8)), penalty=lambda: torch.tensor(math.inf))
    assert "in the penalty" in caught.value.where


def test_nothing_to_learn(model):
    with pytest.raises(UsageError, match="nothing is to learn"):
        fit(model, batches(sequences(8)), names=[])


def test_batches_of_other_processes_are_refused(model):
    with pytest.raises(UsageError, match="not shared among the processes of this run"):
        fit(model, Batches(sequences(8), world=2))


def test_no_dropout_by_default_and_the_config_is_kept():
    """Oracle 14."""
    model = tiny("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3)
    config = model.config.to_dict()
    rates = []

    def listen(progress):
        modules = model.modules()
        rates.append(max(one.p for one in modules if isinstance(one, torch.nn.Dropout)))

    report = fit(model, batches(sequences(8)), lr=0.0, records=Records(listen=listen))
    assert rates == [0.0]
    with torch.no_grad():
        (batch,) = batches(sequences(8)).micro(0)
        expected = Head.of(model).label_losses(batch) / batch.learnt
    assert report.losses == pytest.approx([expected.item()], rel=1e-6)
    assert model.config.to_dict() == config
    assert {one.p for one in model.modules() if isinstance(one, torch.nn.Dropout)} == {0.3}
    noisy = fit(model, batches(sequences(8)), lr=0.0, dropout=True)
    assert abs(noisy.losses[0] - report.losses[0]) > 1e-3


def test_dropout_that_attention_takes_as_a_number():
    model = tiny("llama", attention_dropout=0.5).train()
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        with without_dropout(model):
            assert torch.equal(model(ids).logits, model.eval()(ids).logits)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5


def test_gradient_checkpointing_gives_the_same_weights(llama):
    runs = []
    for checkpointing in (False, True):
        model = model_of(llama)
        fit(model, batches(sequences(8)), gradient_checkpointing=checkpointing)
        runs.append(values(model))
    assert same_bits(*runs)


def test_bfloat16_masters_move_where_plain_weights_do_not(tiny_folder):
    """Oracle 15."""
    folder = tiny_folder("llama", tokenizer=False)
    options = {"lr": 1e-6, "names": ["model.embed_tokens.weight"]}
    examples = [sequence(60, seed) for seed in range(1, 9)]
    plain, kept = model_of(folder, dtype="bfloat16"), model_of(folder, dtype="bfloat16")
    with pytest.raises(Unsupported, match="do not move at this rate") as caught:
        fit(plain, batches(examples), master_weights=False, **options)
    assert "master_weights" in caught.value.remedy

    weight = plain.get_parameter("model.embed_tokens.weight").detach().clone()
    moved = ((weight - 1e-6) != weight).float().mean()
    assert moved < 0.05, "an update of one rate is lost in bfloat16"

    masters = []
    settings = TrainSettings(lr=1e-6)
    weights = Weights(select(kept, ["model.embed_tokens.weight"]))
    from regraft.core.training.optimisers import make_optimizer

    optimizer = make_optimizer(settings, weights)
    (leaf,) = weights.leaves.values()
    assert leaf.dtype == torch.float32
    masters.append(leaf.clone())
    leaf.grad = torch.randn_like(leaf)
    optimizer.step()
    assert (leaf != masters[0]).float().mean() > 0.95
    report = fit(kept, batches(examples), **options)
    assert report.steps == 1
    fit(plain, batches(examples), master_weights=False, names=options["names"], lr=1e-3)


def test_precision_follows_the_device(monkeypatch):
    monkeypatch.setattr(modes, "bf16_is_fast", lambda device: False)
    assert resolve_precision("auto", "cpu") == "float32"
    with pytest.raises(Unsupported, match="bfloat16 many times slower"):
        resolve_precision("bfloat16", "cpu")
    monkeypatch.setattr(modes, "bf16_is_fast", lambda device: True)
    assert resolve_precision("auto", "cpu") == resolve_precision("bfloat16", "cpu") == "bfloat16"


@pytest.mark.parametrize(("text", "fast"), [("flags\t: fpu avx2 avx512_bf16\n", True), ("flags : fpu avx2\n", False)])
def test_fast_processors_are_known_by_their_flags(monkeypatch, text, fast):
    monkeypatch.setattr(modes.Path, "read_text", lambda self: f"processor : 0\n{text}")
    assert bf16_is_fast("cpu") == fast


def test_autocast_keeps_fp32_weights(llama, monkeypatch):
    monkeypatch.setattr(modes, "bf16_is_fast", lambda device: True)
    model = model_of(llama)
    report = fit(model, batches(sequences(8), epochs=5), precision="bfloat16")
    assert report.precision == "bfloat16"
    exact = fit(model_of(llama), batches(sequences(8), epochs=5))
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    assert report.losses != exact.losses
    assert report.losses == pytest.approx(exact.losses, rel=0.03)


@pytest.mark.gpu
def test_on_cuda_two_runs_give_the_same_bytes(llama):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    runs = []
    for _ in range(2):
        model = model_of(llama, device="cuda")
        fit(model, batches(sequences(16), batch_size=8, epochs=4), precision="auto")
        runs.append(values(model))
    assert same_bits(*runs)


def test_base_file_is_untouched(llama):
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in sorted(llama.iterdir())}
    fit(model_of(llama), batches(sequences(8)), lr=1.0)
    assert before == {path.name: hashlib.sha256(path.read_bytes()).digest() for path in sorted(llama.iterdir())}
