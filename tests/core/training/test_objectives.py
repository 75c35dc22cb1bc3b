"""DPO: ln 2 at the start, its gradient, its reference."""

import math

import pytest
import torch

from regraft.core.errors import InputError
from regraft.core.training.head import Head
from regraft.core.training.objectives import CrossEntropy, Dpo, ReferencePass, answer_log_probs
from tests.core.training.support import batches, fit, model_of, pairs


@pytest.fixture
def model(llama):
    return model_of(llama)


def made(model, count=6, beta=0.5, **settings):
    data = batches(pairs(count), batch_size=count, **settings)
    head = Head.of(model)
    return data, Dpo(head, ReferencePass(head, data).log_probs(), beta)


def test_loss_is_ln_2_at_the_start(model):
    """Oracle 11."""
    data, objective = made(model, micro_batch=2)
    total = sum(objective(piece)[0] for piece in data.micro(0))
    assert total / data.units(0) == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_gradient_at_the_start_is_half_beta(model, beta):
    data, objective = made(model, beta=beta)
    (batch,) = data.micro(0)
    name = "model.layers.1.mlp.up_proj.weight"
    weight = model.get_parameter(name).requires_grad_(True)
    (ours,) = torch.autograd.grad(objective(batch)[0], weight)
    chosen, rejected = answer_log_probs(objective.head, batch)
    (margin,) = torch.autograd.grad((chosen - rejected).sum(), weight)
    torch.testing.assert_close(ours, -beta / 2 * margin, rtol=1e-4, atol=1e-7)


def test_answers_log_probability_is_the_sum_over_its_tokens(model):
    data, objective = made(model, 2, shuffle=False)
    (batch,) = data.micro(0)
    chosen, rejected = answer_log_probs(objective.head, batch)
    for values, examples in ((chosen, "chosen"), (rejected, "rejected")):
        for value, pair in zip(values, data.examples, strict=True):
            ids = torch.tensor([list(getattr(pair, examples).ids)])
            with torch.no_grad():
                logs = model(ids).logits.log_softmax(-1)[0]
            expected = sum(logs[index - 1, ids[0, index]] for index in range(4, ids.shape[1]))
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_learning_ranks_the_pairs(model):
    data, objective = made(model, epochs=12)
    seen = []
    from regraft.core.training.loop import Records

    report = fit(model, data, objective=objective, records=Records(listen=seen.append), lr=3e-3)
    assert report.losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert report.final_loss < 0.1
    assert seen[-1].figures["accuracy"] == 1
    assert seen[-1].figures["margin"] > 2


def test_reference_is_kept_in_a_file(model, tmp_path):
    data, head, cache = batches(pairs(4), batch_size=4), Head.of(model), tmp_path / "reference.safetensors"
    first = ReferencePass(head, data, cache=cache, identity={"base": "a"}).log_probs()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    assert torch.equal(ReferencePass(head, data, cache=cache, identity={"base": "a"}).log_probs(), first)
    other = ReferencePass(head, data, cache=cache, identity={"base": "b"}).log_probs()
    assert not torch.equal(other, first), "another base, another reference"
    fewer = batches(pairs(3), batch_size=3)
    assert len(ReferencePass(head, fewer, cache=cache, identity={"base": "b"}).log_probs()) == 3
    cache.write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged"):
        ReferencePass(head, data, cache=cache).log_probs()


def test_identities_tell_objectives_apart(model):
    _, objective = made(model)
    others = [CrossEntropy(objective.head), Dpo(objective.head, objective.reference, 0.1)]
    assert all(one.identity() != objective.identity() for one in others)
