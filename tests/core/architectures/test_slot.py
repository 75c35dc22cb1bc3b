"""Reading and writing a role's part of a stored tensor, in every layout."""

import pytest

from tests.families import FAMILIES


def slots(architecture):
    for layer in (None, *range(architecture.num_layers)):
        sparse = layer is not None and "router" in architecture.roles(layer)
        for role in architecture.roles(layer):
            expert = 1 if sparse and role in ("gate_proj", "up_proj", "down_proj") else None
            yield architecture.slot(role, layer, expert)


@pytest.mark.parametrize("name", [*FAMILIES, "falcon-multi-query", "falcon-multi-head"])
def test_what_is_written_is_read_back_and_nothing_else_changes(saved, name):
    import torch

    checkpoint = saved(name)
    for slot in slots(checkpoint.architecture):
        stored = checkpoint.tensors[slot.tensor]
        assert tuple(stored.shape) == slot.shape
        part = slot.read(stored)
        assert part.shape == ((slot.num_rows,) if slot.num_columns is None else (slot.num_rows, slot.num_columns))
        marked = slot.write(stored, torch.full_like(part, 77.0))
        assert torch.equal(slot.read(marked), torch.full_like(part, 77.0))
        assert int((marked == 77.0).sum()) == part.numel()
        assert torch.equal(slot.write(marked, part), stored)


def test_a_stacked_expert_is_written_alone(saved):
    import torch

    from regraft.core.architectures import architecture_of

    live = saved("mixtral").model.state_dict()
    slot = architecture_of(saved("mixtral").config, live).slot("up_proj", 0, 2)
    assert (slot.row_axis, slot.column_axis, slot.whole) == (1, 2, False)
    marked = slot.write(live[slot.tensor], torch.full((96, 64), 77.0))
    changed = (marked != live[slot.tensor]).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]
    assert torch.equal(marked[2, :96], live[slot.tensor][2, :96])


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon-biased", "glm4"])
def test_biases_follow_the_rows(saved, name):
    import torch

    checkpoint = saved(name)
    roles = [checkpoint.architecture.slot(role, 0) for role in ("q_proj", "k_proj", "v_proj")]
    for slot in roles:
        bias = checkpoint.tensors[slot.bias]
        part = slot.read_bias(bias)
        assert part.shape == (slot.num_rows,)
        assert torch.equal(part, bias[slot.row_indices()])
        marked = slot.write_bias(bias, torch.full_like(part, 77.0))
        assert [row for row, value in enumerate(marked.tolist()) if value == 77.0] == sorted(slot.row_indices())


@pytest.mark.parametrize("name", [*FAMILIES, "falcon-multi-head", "falcon-multi-query"])
def test_fused_roles_share_out_the_rows(saved, name):
    architecture = saved(name).architecture
    found = {}
    for role in ("q_proj", "k_proj", "v_proj"):
        slot = architecture.slot(role, 0)
        found.setdefault(slot.tensor, []).extend(slot.row_indices())
    for tensor, rows in found.items():
        axis = 1 if name == "gpt2" else 0
        assert sorted(rows) == list(range(saved(name).shapes[tensor][axis]))


def test_rows_of_two_runs_do_not_stand_together(saved):
    slot = saved("gpt_neox").architecture.slot("q_proj", 0)
    assert slot.span(16, 32) == slice(48, 64)
    with pytest.raises(ValueError, match="do not stand together"):
        slot.span(8, 24)
