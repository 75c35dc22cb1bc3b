"""Order, sizes and tensors of the steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.examples import IGNORED, Example, PreferenceExample, ints
from regraft.core.data.rows import Place
from regraft.core.errors import InputError, UsageError


def example(*ids, labels=None, positions=None):
    return Example(ints(ids), ints(labels or ids), Place("a", 1), positions and ints(positions))


def batches(count=10, *, seed=0, rank=0, world=1, **settings):
    return Batches([example(n, n, n) for n in range(count)], BatchSettings(**settings), seed, rank, world)


def test_hundred_samples_make_six_steps():
    hundred = batches(100, batch_size=32, epochs=2)
    assert len(hundred) == 6
    for epoch in range(2):
        seen = [one for step in range(3) for one in hundred.indices(3 * epoch + step)]
        assert len(seen) == len(set(seen)) == 96
    assert len(batches(100, batch_size=32, epochs=2, drop_last=False)) == 8
    assert len(batches(100, batch_size=32, epochs=2, steps=4)) == 4


def test_every_epoch_has_its_own_order():
    kept = batches(12, batch_size=4, epochs=2, drop_last=False)
    first, second = ([one for step in range(3) for one in kept.indices(3 * epoch + step)] for epoch in range(2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert first == [one for step in range(3) for one in batches(12, batch_size=4).indices(step)]
    assert first != [one for step in range(3) for one in batches(12, batch_size=4, seed=1).indices(step)]
    assert batches(12, batch_size=4, shuffle=False).indices(1) == (4, 5, 6, 7)


def test_order_depends_on_nothing_but_the_seed():
    code = "from tests.core.data.test_batches import batches; print(batches(12, batch_size=12).indices(0))"
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                       cwd=Path(__file__).parents[3], env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for seed in ("0", "1")
    }  # fmt: skip
    assert outputs == {f"{batches(12, batch_size=12).indices(0)}\n"}


def test_ranks_share_every_batch():
    whole = batches(8, batch_size=4)
    halves = [batches(8, batch_size=4, rank=rank, world=2) for rank in range(2)]
    for step in range(2):
        own = [one for half in halves for batch in half.micro(step) for one in batch.indices]
        assert tuple(own) == whole.indices(step)
        assert {half.units(step) for half in halves} == {whole.units(step)}
    with pytest.raises(UsageError, match="shared equally"):
        batches(8, batch_size=3, world=2)


def test_fewer_than_a_batch():
    with pytest.raises(InputError, match="fewer sequences") as caught:
        batches(3, batch_size=4)
    assert "drop_last" in caught.value.remedy
    assert len(batches(3, batch_size=4, drop_last=False)) == 1


def test_micro_batches_cover_the_batch():
    pieces = batches(8, batch_size=8, micro_batch=3).micro(0)
    assert [len(piece.indices) for piece in pieces] == [3, 3, 2]
    assert sum(piece.learnt for piece in pieces) == batches(8, batch_size=8).units(0) == 16


def test_tensors_are_padded_on_the_right():
    import torch

    rows = [example(1, 2, 3, labels=[IGNORED, 2, 3]), example(4, 5)]
    (batch,) = Batches(rows, BatchSettings(batch_size=2, shuffle=False)).micro(0)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 5, 0]]
    assert batch.labels.tolist() == [[IGNORED, 2, 3], [4, 5, IGNORED]]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.position_ids is None
    assert (batch.tokens, batch.learnt) == (5, 3)


def test_positions_of_packed_sequences():
    rows = [example(1, 2, 3, positions=[0, 1, 0]), example(4, 5)]
    (batch,) = Batches(rows, BatchSettings(batch_size=2, shuffle=False)).micro(0)
    assert batch.position_ids.tolist() == [[0, 1, 0], [0, 1, 0]]


def test_pairs_stand_chosen_first():
    pairs = [PreferenceExample(example(n, 1), example(n, 2)) for n in (7, 8)]
    made = Batches(pairs, BatchSettings(batch_size=2, shuffle=False))
    (batch,) = made.micro(0)
    assert batch.input_ids.tolist() == [[7, 1], [8, 1], [7, 2], [8, 2]]
    assert made.pairs
    assert made.units(0) == 2


def test_identity_tells_data_and_order_apart():
    same, other = batches(8), batches(8)
    assert same.identity() == other.identity()
    for changed in (batches(9), batches(8, seed=1), batches(8, batch_size=4), batches(8, epochs=3)):
        assert changed.identity() != same.identity()
