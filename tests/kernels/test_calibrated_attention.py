"""Calibrated attention against the paper's formulas, and the pieces against the whole."""

import itertools

import pytest
import torch

from regraft.kernels import calibrated_attention as module
from regraft.kernels import calibrated_attention_chunked as chunked
from regraft.kernels.calibrated_attention import Calibration, calibrated_attention, reference
from regraft.kernels.calibrated_attention_chunked import calibrated_chunked

CALIBRATIONS = [
    Calibration(causal=causal, relative=relative, tau=3.0 if relative else 0.1)
    for causal, relative in itertools.product((True, False), repeat=2)
]
PADDINGS = (None, "left", "right")


def operands(length=37, *, batch=2, heads=4, groups=2, width=8, dtype=torch.float64, seed=0, spike=30):
    """Keys 5 and 17 draw weight from every head, key 9 all of the weight of some rows of one head."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, count, length, width, dtype=torch.float64, generator=generator)
        for count in (heads, groups, groups)
    )
    key[:, :, [at for at in (5, 17) if at < length]] *= 3
    query += 0.5 * key[:, :1, [min(5, length - 1)]]
    if length > 9:
        key[0, 0, 9] = spike * query[0, 0, -3:].mean(0)
    return [one.to(dtype) for one in (query, key, value)]


def padding_of(kind, batch, length, missing=6):
    if kind is None:
        return None
    padding = torch.ones(batch, length, dtype=torch.bool)
    padding[-1, slice(missing) if kind == "left" else slice(length - missing, length)] = False
    return padding


def real(output, padding):
    return output if padding is None else output * padding[:, None, :, None]


def uniform(weights):
    """Operands whose attention has these weights [L, L]: the keys are the unit vectors."""
    length = weights.shape[0]
    query = weights.double().clamp_min(1e-300).log()[None, None]
    return query, torch.eye(length, dtype=torch.float64)[None, None], torch.eye(length, dtype=torch.float64)[None, None]


def test_the_hand_example():
    """Row 7 with its third key a sink: s = .3, g = .88 / .7."""
    row = torch.tensor([0.3, 0.05, 0.3, 0.05, 0.1, 0.05, 0.05, 0.1])
    weights = torch.eye(8)
    weights[7], weights[2:7, 2] = row, 0.9
    query, key, value = uniform(weights)
    for beta, wanted in ((0.4, [0.88 / 0.7 * one for one in row.tolist()]), (1.0, row.tolist())):
        wanted[2] = beta * 0.3
        ours, _ = calibrated_attention(
            query, key, value, Calibration(beta, 0.5, causal=False, min_queries=1), scale=1.0
        )
        assert ours[0, 0, 7].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(("calibration", "kind"), list(itertools.product(CALIBRATIONS, PADDINGS)))
def test_pieces_equal_the_whole(calibration, kind):
    """Of any size, grouped heads, with a mask as with padding, softcapped or not; and so does the weight on sinks."""
    query, key, value = operands()
    padding = padding_of(kind, 2, 37)
    for cap in (None, 4.0):
        expected, _, sinks = reference(query, key, value, calibration, padding=padding, softcap=cap)
        plain = reference(query, key, value, calibration._replace(beta=1.0), padding=padding, softcap=cap)[1]
        assert sinks.any()
        there = torch.ones(2, 37, dtype=torch.bool) if padding is None else padding
        mass = ((plain * sinks).sum(-1) * there[:, None]).sum(-1)
        seen = torch.ones(37, 37, dtype=torch.bool).tril() & there[:, None]
        masks = [
            {"padding": padding},
            {"mask": seen[:, None]},
            {"mask": torch.zeros(2, 1, 37, 37).masked_fill(~seen[:, None], torch.finfo(torch.float32).min)},
        ]
        if (
            kind == "right"
        ):  # a mask does not tell which rows are padding unless it hides their own key, as it does here
            assert not seen[1, 36, 36]
        for size, how in itertools.product((7, None) if cap else (1, 11), masks):
            ours, memory = calibrated_chunked(query, key, value, calibration, rows=size, softcap=cap, **how)
            assert (real(ours - expected, padding)).abs().max() < 1e-10
            assert (memory.mass - mass).abs().max() < 1e-10
            assert memory.real.expand(2).tolist() == there.sum(-1).tolist()


def test_limits():
    """beta 1 and thresholds never reached change nothing; beta 0 is softmax without the sinks; rows sum to 1."""
    query, key, value = operands(spike=3)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    for calibration in CALIBRATIONS:
        for same in (
            calibration._replace(beta=1.0),
            calibration._replace(tau=40.0),
            calibration._replace(min_queries=99),
        ):
            assert (calibrated_attention(query, key, value, same)[0] - plain).abs().max() < 1e-12
        _, changed, sinks = reference(query, key, value, calibration)
        before = reference(query, key, value, calibration._replace(beta=1.0))[1]
        assert (changed.sum(-1) - 1).abs().max() < 1e-12
        assert changed.min() >= 0
        assert torch.allclose(changed[sinks], 0.4 * before[sinks])
        others = torch.where(sinks, 0.0, before)
        assert torch.allclose(torch.where(sinks, 0.0, changed) * others.sum(-1, keepdim=True),
                              others * torch.where(sinks, 0.0, changed).sum(-1, keepdim=True))  # fmt: skip
        none = reference(query, key, value, calibration._replace(beta=0.0))[1]
        assert torch.allclose(none, others / others.sum(-1, keepdim=True))


def test_two_other_forms():
    """A bias of the logits, ln(beta (1 - s) / (1 - beta s)) on sinks; and beta s O_Z + (1 - beta s) O_N."""
    query, key, value = operands(spike=3)
    for calibration in CALIBRATIONS:
        ours, changed, sinks = reference(query, key, value, calibration)
        plain = reference(query, key, value, calibration._replace(beta=1.0))[1]
        s = (plain * sinks).sum(-1, keepdim=True)
        bias = torch.where(sinks, (0.4 * (1 - s) / (1 - 0.4 * s)).log(), 0.0)
        assert ((plain.log() + bias).softmax(-1) - changed).abs().max() < 1e-12
        values = value.repeat_interleave(2, 1)
        on, off = (
            torch.where(some, plain, 0.0)
            @ values
            / torch.where(some, plain, 0.0).sum(-1, keepdim=True).clamp_min(1e-300)
            for some in (sinks, ~sinks)
        )
        assert (0.4 * s * on + (1 - 0.4 * s) * off - ours).abs().max() < 1e-12


def test_what_a_sink_is():
    """The first real key is spared, strong or weak; a weak first key lets no other escape; few rows are not enough."""
    length = 24
    weights = torch.full((length, length), 0.001).tril()
    weights[:, [5, 17]] = 0.3
    weights = weights.tril() + 0.2 * torch.eye(length)
    query, key, value = uniform(weights / weights.sum(-1, keepdim=True))
    for causal in (True, False):
        _, _, sinks = reference(query, key, value, Calibration(causal=causal, min_queries=4), scale=1.0)
        assert sinks[0, 0, -1].nonzero()[:, 0].tolist() == [5, 17]
        alone = reference(query, key, value, Calibration(causal=causal, min_queries=1), scale=1.0)[2]
        assert alone[0, 0, -1, -1] == alone[0, 0, -1, 5] == 1
        padding = torch.ones(1, length, dtype=torch.bool)
        padding[0, :5] = False
        spared = reference(query, key, value, Calibration(causal=causal), scale=1.0, padding=padding)[2]
        assert spared[0, 0, -1].nonzero()[:, 0].tolist() == [17]
        given = Calibration(causal=causal, spare_first=False)
        assert reference(query, key, value, given, scale=1.0, padding=padding)[2][0, 0, -1].nonzero()[
            :, 0
        ].tolist() == [5, 17]
    few = int(reference(query, key, value, Calibration(causal=False), scale=1.0)[2][0, 0, -1].sum())
    assert few * (few + 1) / 2 < length / 0.1


def test_the_causal_scope_looks_at_no_later_row():
    """A prefix gives the same bits in the specification; the prompt's scope is another thing, by its nature."""
    query, key, value = operands(dtype=torch.float32)
    later = [one.clone() for one in (query, key, value)]
    for one in later:
        one[:, :, 25:] *= -2
    causal, prompt = CALIBRATIONS[0], CALIBRATIONS[2]
    first, second = (reference(*some, causal)[0][:, :, :25] for some in ((query, key, value), later))
    assert torch.equal(first, second)
    first, second = (reference(*some, prompt)[0][:, :, :25] for some in ((query, key, value), later))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("static", [False, True])
def test_rows_that_follow_go_on_from_the_memory(calibration, static):
    """Pieces of a prompt and single rows, keys that grow or are all there from the beginning, half of them padded."""
    query, key, value = operands()
    for kind in (None, "left"):
        padding = padding_of(kind, 2, 37)
        whole, _ = calibrated_attention(query, key, value, calibration, padding=padding)
        memory, start, outputs = None, 0, []
        for stop in (20, 30, 31, 32, 33, 34, 35, 36, 37) if calibration.causal else (37,):
            end = 37 if static else stop
            piece, memory = calibrated_attention(
                query[:, :, start:stop], key[:, :, :end], value[:, :, :end], calibration,
                padding=None if padding is None else padding[:, :end], offset=start, memory=memory,
            )  # fmt: skip
            assert memory.rows == stop
            outputs.append(piece)
            start = stop
        assert (real(torch.cat(outputs, 2) - whole, padding)).abs().max() < 1e-10


def test_the_prompts_sinks_stay_while_tokens_follow():
    """Rows that come alone keep the prompt's Z: A' of such a row sums to 1 and is cut at Z, newer keys are not."""
    calibration = Calibration(causal=False)
    query, key, value = operands(heads=2, groups=2, spike=3)
    value = torch.eye(37, dtype=torch.float64).expand(2, 2, 37, 37)
    _, memory = calibrated_attention(query[:, :, :36], key[:, :, :36], value[:, :, :36], calibration)
    last, after = calibrated_attention(query[:, :, 36:], key, value, calibration, offset=36, memory=memory)
    plain = reference(query, key, value, calibration._replace(beta=1.0))[1][:, :, 36]
    sinks = torch.nn.functional.pad(memory.sinks, (0, 1))
    assert sinks.any()
    assert (last[:, :, 0].sum(-1) - 1).abs().max() < 1e-12
    assert torch.allclose(last[:, :, 0][sinks], 0.4 * plain[sinks])
    assert torch.equal(after.sums[..., :36], memory.sums)


def test_rows_that_lie_on_sinks():
    """1 - s of 1e-9 keeps its digits in fp32; a row with nothing beside its sinks stays as it is; no NaN in fp16."""
    weights = torch.full((40, 40), 1e-12).tril()
    weights[:, 3] = 1.0
    weights[20:, 7] = 1e-9
    weights[30:, 4:] = weights[30:, :3] = 0.0
    query, key, value = uniform(weights.tril() + torch.eye(40) * 1e-12)
    for causal in (True, False):
        calibration = Calibration(causal=causal)
        expected = reference(query, key, value, calibration, scale=1.0)[0]
        assert expected[0, 0, 25, 7] > 0.5
        single = [one.float() for one in (query, key, value)]
        ours, _ = calibrated_attention(*single, calibration, scale=1.0)
        assert (ours - expected)[:, :, :30].abs().max() < 1e-5
        for dtype in (torch.float16, torch.bfloat16):
            low, _ = calibrated_attention(*(one.to(dtype) for one in single), calibration, scale=1.0)
            assert low.dtype == dtype
            assert low.isfinite().all()


def test_gradients_flow_with_the_sinks_held():
    query, key, value = (one.requires_grad_() for one in operands(17, batch=1))
    for calibration in CALIBRATIONS:
        upstream = torch.randn(1, 4, 17, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        wanted = torch.autograd.grad(reference(query, key, value, calibration)[0], (query, key, value), upstream)
        ours = torch.autograd.grad(
            calibrated_attention(query, key, value, calibration)[0], (query, key, value), upstream
        )
        for one, other in zip(ours, wanted, strict=True):
            assert (one - other).abs().max() < 1e-10


def test_heads_in_turn_are_heads_at_once(monkeypatch):
    """Where not all fit, some heads go first; grouped, over two calls whose memory is handed on, gradients included."""
    padding = padding_of("left", 2, 40)
    query, key, value = operands(40, heads=8, groups=4)
    query[..., 20:, :] += key[:, :1, 20:]  # more columns than are looked at one by one
    for calibration in CALIBRATIONS:
        both = []
        for elements in (chunked.PIECE_ELEMENTS, 64):
            monkeypatch.setattr(chunked, "PIECE_ELEMENTS", elements)
            some = [one.clone().requires_grad_() for one in (query, key, value)]
            first, memory = calibrated_attention(
                *(one[:, :, :33] for one in some), calibration, padding=padding[:, :33]
            )
            last, after = calibrated_attention(
                some[0][:, :, 33:], *some[1:], calibration, padding=padding, offset=33, memory=memory
            )
            whole = torch.cat([first, last], 2) * padding[:, None, :, None]
            gradients = torch.autograd.grad(whole.square().sum(), some)
            both.append([whole, *gradients, after.sums, after.mass, after.counts.expand(2, -1), after.real.expand(2)])
            both[-1].append(torch.zeros(1) if calibration.causal else after.sinks.double())
        for one, other in zip(*both, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() < 1e-10


def test_nothing_of_size_rows_times_keys_is_held(monkeypatch):
    """The largest tensor that any operation makes is room for a piece's scores and weights."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for one in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(one, torch.Tensor) and one.layout == torch.strided:
                    self.elements = max(self.elements, one.numel())
            return result

    monkeypatch.setattr(chunked, "PIECE_ELEMENTS", 1 << 12)
    query, key, value = operands(1024, batch=1, heads=1, groups=1, width=8, dtype=torch.float32)
    for calibration in CALIBRATIONS:
        with Largest() as seen:
            calibrated_attention(query, key, value, calibration)
        assert seen.elements <= 2 * 32 * 1024 < 1024 * 1024 / 8


def test_what_does_not_fit_is_refused():
    query, key, value = operands()
    with pytest.raises(ValueError, match="shapes do not fit"):
        calibrated_attention(query, key[:, :, :20], value[:, :, :20], Calibration())
    with pytest.raises(ValueError, match="padding is bool"):
        calibrated_attention(query, key, value, Calibration(), padding=torch.ones(2, 37))
    with pytest.raises(ValueError, match="the memory ends at 0"):
        calibrated_attention(query[:, :, 1:], key, value, Calibration(), offset=1)
    with pytest.raises(ValueError, match="beta is from 0 to 1"):
        calibrated_attention(query, key, value, Calibration(beta=1.5))
    with pytest.raises(RuntimeError, match="cannot run"):
        calibrated_attention(query, key, value, Calibration(), implementation="triton")
    assert module._WIDEST == 128
