"""Changed weights are quantised again as bitsandbytes does it, and what is lost of the change is measured."""

import json
from dataclasses import replace

import pytest

from regraft.core.dequantised import EightBitTensor, FourBitTensor
from regraft.core.errors import TransformationError
from regraft.core.fourbit import parse_state
from regraft.core.operations import ComputedTensor
from regraft.core.quantised import parts_like
from regraft.core.realised import Gauge, Realised
from regraft.core.repack import widened
from regraft.core.specs import TensorSpec
from regraft.core.tensors import MemoryTensor
from tests.core.quantising import Opaque, delta

pytestmark = [
    # torch's own compiler, imported by bitsandbytes, still uses what torch deprecates
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


def quantised(weight, quant_type, block_size, *, double, storage="uint8"):
    """A weight as bitsandbytes quantises it, and as regraft shows it in fp32."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(
        weight, blocksize=block_size, quant_type=quant_type, compress_statistics=double,
        quant_storage=getattr(torch, storage),
    )  # fmt: skip
    parts = state.as_dict(packed=True)
    text = bytes(parts[f"quant_state.bitsandbytes__{quant_type}"].numpy())
    nested = [MemoryTensor(f"w.{key}", parts[key]) for key in ("nested_absmax", "nested_quant_map") if double]
    shown = FourBitTensor(
        TensorSpec("w", "F32", tuple(weight.shape)), parse_state(text, "w", nested=double), MemoryTensor("w", codes),
        MemoryTensor("w.absmax", parts["absmax"]), *nested,
    )  # fmt: skip
    return shown, codes, parts


SHAPES = [(7, 37), (33, 100), (5, 64), (600, 320), (3, 140_032)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("quant_type", "block_size", "double", "storage"),
    [("nf4", 64, False, "uint8"), ("nf4", 64, True, "uint8"), ("nf4", 128, True, "uint8"), ("fp4", 64, False, "uint8"),
     ("fp4", 256, True, "uint8"), ("nf4", 4096, False, "uint8"), ("nf4", 64, True, "bfloat16")],
)  # fmt: skip
def test_a_changed_weight_is_quantised_as_bitsandbytes_quantises_it(quant_type, block_size, double, storage, shape):
    """All but codes of scales that lie at a midpoint, which bitsandbytes' CPU library finds through a coarse table."""
    import torch

    if storage != "uint8" and -(-shape[0] * shape[1] // 2) % 2:
        pytest.skip("bitsandbytes itself cannot store it")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    stored, *_ = quantised(weight, quant_type, block_size, double=double, storage=storage)
    new = ComputedTensor(stored.spec, delta("w", *shape), (stored,))
    found = {part.spec.name: part.load() for part in parts_like(new, stored, None)}
    _, codes, expected = quantised(new.load(), quant_type, block_size, double=double, storage=storage)
    assert torch.equal(found["w"].view(torch.uint8), codes.view(torch.uint8))
    if not double:
        assert torch.equal(found["w.absmax"], expected["absmax"])
        return
    assert torch.equal(found["w.nested_absmax"], expected["nested_absmax"])
    name = f"quant_state.bitsandbytes__{quant_type}"
    assert json.loads(bytes(found[f"w.{name}"].numpy())) == json.loads(bytes(expected[name].numpy()))
    differ = found["w.absmax"] != expected["absmax"]
    table, ours, theirs = expected["nested_quant_map"], found["w.absmax"][differ], expected["absmax"][differ]
    assert differ.float().mean() < 0.005 or differ.sum() == 1
    offset = json.loads(bytes(expected[name].numpy()))["nested_offset"]
    plain, *_ = quantised(new.load(), quant_type, block_size, double=False)
    scaled = (plain.scales.load() - torch.tensor(offset)) / expected["nested_absmax"].repeat_interleave(256)[
        : len(differ)
    ]
    middle = (table[ours.long()] + table[theirs.long()]) / 2
    assert ((scaled[differ] - middle).abs() < 2 / 65535).all()


@pytest.mark.parametrize("shape", [(7, 37), (600, 320)], ids=str)
def test_a_changed_8_bit_weight_is_quantised_as_bitsandbytes_quantises_it(shape):
    import torch
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    stored = EightBitTensor(
        TensorSpec("m.weight", "F32", shape), MemoryTensor("m.weight", codes), MemoryTensor("m.SCB", scales)
    )
    new = ComputedTensor(stored.spec, delta("m.weight", *shape), (stored,))
    gauge = Gauge(stored)
    found = [part.load() for part in parts_like(new, stored, gauge)]
    expected = int8_vectorwise_quant(new.load().half())
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    kept = expected[0].float() * expected[1][:, None] / 127 - stored.load()
    wanted = new.load() - stored.load()
    cosine = torch.cosine_similarity(kept.flatten().double(), wanted.flatten().double(), dim=0).item()
    assert Realised("int8", {"m.weight": gauge}).total() == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("double", [False, True])
def test_the_merge_in_4_bits_has_the_bits_of_the_way_through_floats(double):
    import torch

    weight = torch.randn(700, 320, generator=torch.Generator().manual_seed(1))
    stored, *_ = quantised(weight, "nf4", 64, double=double)
    new = ComputedTensor(stored.spec, delta("w", 700, 320), (stored,))
    direct, around = (parts_like(each, stored, None) for each in (new, Opaque(new)))
    assert direct[0].merge is not None
    assert around[0].merge is None
    for part, other in zip(direct, around, strict=True):
        whole, read = part.load(), part.open()
        assert torch.equal(whole, other.load())
        edges = [0, part.spec.rows // 3 // 64 * 64, part.spec.rows]
        pieces = [read(*edges[at : at + 2]) for at in range(2) if edges[at] < edges[at + 1]]
        assert torch.equal(torch.cat(pieces).view(whole.shape), whole)


TABLE = [(0.005, 0.036), (0.05, 0.387), (0.51, 0.980)]
"""rms(dW) / rms(W) and the cosine that arrives: shared measurements of a 512 x 512 weight, N(0, 0.02), rank 8."""


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("size", "expected"), TABLE)
def test_small_deltas_are_lost_and_refused(size, expected, double):
    import torch

    weight = 0.02 * torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    stored, *_ = quantised(weight, "nf4", 64, double=double)
    new = ComputedTensor(stored.spec, delta("w", 512, 512, 0.02 * size, rank=8), (stored,))
    gauge = Gauge(stored)
    for part in parts_like(new, stored, gauge):
        part.load()
    realised = Realised("nf4", {"w": gauge})
    assert realised.total() == pytest.approx(expected, abs=0.03)
    if expected > 0.9:
        realised.check(0.9)
        return
    with pytest.raises(TransformationError, match=r"w: .* loses the change of 1 of 1 weights") as caught:
        realised.check(0.9)
    assert 'quantize = "none"' in caught.value.remedy
    assert 'format = "adapter"' in caught.value.remedy
    realised.check(-1.0)


def test_a_change_below_the_shown_dtype_is_still_seen():
    """The base is shown in bfloat16, whose rounding swallows the delta; it must not pass for no change at all."""
    import torch

    weight = 0.02 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    stored, *_ = quantised(weight, "nf4", 64, double=False)
    shown = widened(stored)
    shown.spec = replace(stored.spec, dtype="BF16")
    new = ComputedTensor(shown.spec, delta("w", 64, 64, 1e-7), (shown,))
    before = shown.load()
    assert torch.equal(new.load()[before != 0], before[before != 0])
    gauge = Gauge(widened(shown))
    for part in parts_like(widened(new), shown, gauge):
        part.load()
    assert Realised("nf4", {"w": gauge}).total() < 0.5
