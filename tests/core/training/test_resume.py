"""A killed training goes on and ends with the same bytes; a state of another recipe, or a damaged one, is refused."""

import json

import pytest
import torch

from regraft.core.errors import InputError, ResourceError, UsageError
from regraft.core.training import state as state_module
from regraft.core.training.loop import Records
from regraft.core.training.weights import Trainable
from tests.checkpoints import same_bits
from tests.core.training.support import batches, fit, model_of, sequences, values

DATA = {"batch_size": 4, "micro_batch": 2, "epochs": 3}


class Killed(BaseException):
    """What no handler catches."""


def killing(step):
    def listen(progress):
        if progress.step == step:
            raise Killed

    return listen


def train(folder, *, state=None, kill=None, dtype="float32", data=None, names=None, trainable=None, **settings):
    model = model_of(folder, dtype=dtype)
    records = Records(state=state, listen=killing(kill))
    options = {"names": names} if trainable is None else {"trainable": trainable(model)}
    report = fit(model, batches(sequences(16), **{**DATA, **(data or {})}), records=records, save_every=2, **options,
                 **settings)  # fmt: skip
    return values(model), report


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 3},
        {"optimizer": "adamw-8bit"},
        {"optimizer": "spam", "spam": {"reset_every": 4, "warmup_steps": 3}},
        {"ema": 0.9},
        {"dropout": True},
        {"dtype": "bfloat16"},
        {"trainable": lambda model: {"slice": Trainable(model.model.layers[0].mlp.up_proj.weight, (1, 5, 9))}},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("kill", [1, 7])
def test_resumed_run_ends_with_the_same_bytes(tiny_folder, tmp_path, settings, kill):
    """Oracle 18."""
    folder = tiny_folder("llama", attention_dropout=0.2)
    whole, expected = train(folder, **settings)
    state = tmp_path / "state"
    with pytest.raises(Killed):
        train(folder, state=state, kill=kill, **settings)
    resumed, report = train(folder, state=state, **settings)
    assert report.resumed == kill // 2 * 2
    assert same_bits(resumed, whole)
    assert report.losses == expected.losses
    assert (report.steps, report.tokens) == (expected.steps, expected.tokens) == (12, 12 * 4 * 12)
    again, done = train(folder, state=state, **settings)
    assert done.resumed == 12, "a finished training is not done again"
    assert same_bits(again, whole)


def test_early_stop_is_remembered(llama, tmp_path):
    settings = {"lr": 3e-3, "stop_loss": 4.9, "stop_window": 1, "data": {"epochs": 50}}
    whole, first = train(llama, state=tmp_path / "state", **settings)
    again, second = train(llama, state=tmp_path / "state", **settings)
    assert first.stopped == second.stopped == "stop_loss"
    assert second.resumed == first.steps
    assert same_bits(whole, again)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"lr": 2e-3}, "settings.lr was 0.001 and is 0.002"),
        ({"optimizer": "spam"}, 'settings.optimizer was "adamw" and is "spam"'),
        ({"data": {"epochs": 4}}, "batches.epochs was 3 and is 4"),
        ({"names": ["model.norm.weight"]}, "trainable"),
    ],
)
def test_another_recipe_is_refused_with_the_difference(llama, tmp_path, change, found):
    with pytest.raises(Killed):
        train(llama, state=tmp_path / "state", kill=3)
    with pytest.raises(UsageError, match="belongs to another training") as caught:
        train(llama, state=tmp_path / "state", **change)
    assert found in caught.value.found


def test_other_data_or_base_is_refused(tiny_folder, tmp_path):
    with pytest.raises(Killed):
        train(tiny_folder("llama"), state=tmp_path / "state", kill=3)
    with pytest.raises(UsageError) as caught:
        train(tiny_folder("llama", seed=1), state=tmp_path / "state")
    assert "start was" in caught.value.found
    model = model_of(tiny_folder("llama"))
    with pytest.raises(UsageError) as caught:
        fit(model, batches(sequences(17), **DATA), records=Records(state=tmp_path / "state"))
    assert "batches.data was" in caught.value.found


def test_another_number_of_torch_threads_is_refused(llama, tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(Killed):
        train(llama, state=tmp_path / "state", kill=3)
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(UsageError) as caught:
            train(llama, state=tmp_path / "state")
    finally:
        torch.set_num_threads(before)
    assert caught.value.found == f"computed.torch_threads was {before} and is {before + 1}"
    assert train(llama, state=tmp_path / "state")[1].resumed == 2


def test_what_is_written_how_often_may_change(llama, tmp_path):
    with pytest.raises(Killed):
        train(llama, state=tmp_path / "state", kill=3)
    model = model_of(llama)
    report = fit(model, batches(sequences(16), **DATA), records=Records(state=tmp_path / "state"), save_every=7)
    assert report.resumed == 2


def test_a_kill_while_saving_leaves_the_state_before(llama, tmp_path, monkeypatch):
    state = tmp_path / "state"
    whole, _ = train(llama)
    written = []
    flush = state_module._flush

    def dying(path):
        written.append(path)
        if "00000004" in str(path):
            raise Killed
        flush(path)

    monkeypatch.setattr(state_module, "_flush", dying)
    with pytest.raises(Killed):
        train(llama, state=state)
    monkeypatch.undo()
    assert sorted(path.name for path in state.iterdir()) == [".step-00000004.part", "step-00000002"]
    resumed, report = train(llama, state=state)
    assert report.resumed == 2
    assert same_bits(resumed, whole)
    assert [path.name for path in state.iterdir()] == ["step-00000012"]


def test_state_files_are_plain(llama, tmp_path):
    train(llama, state=tmp_path / "state")
    (folder,) = (tmp_path / "state").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]
    facts = json.loads((folder / "state.json").read_text())
    assert facts["step"] == len(facts["losses"]) == 12


@pytest.mark.parametrize("file", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"{}"])
def test_damaged_state(llama, tmp_path, file, damage):
    with pytest.raises(Killed):
        train(llama, state=tmp_path / "state", kill=3)
    (folder,) = (tmp_path / "state").iterdir()
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(InputError, match="saved state is damaged") as caught:
        train(llama, state=tmp_path / "state")
    assert "--restart" in caught.value.remedy


def test_tensors_of_another_step(llama, tmp_path):
    from regraft.core.training.tensor_file import read_tensors, write_tensors

    with pytest.raises(Killed):
        train(llama, state=tmp_path / "state", kill=3)
    (folder,) = (tmp_path / "state").iterdir()
    tensors, _ = read_tensors(folder / "state.safetensors")
    write_tensors(folder / "state.safetensors", tensors, {"step": "1"})
    with pytest.raises(InputError, match="damaged"):
        train(llama, state=tmp_path / "state")
    write_tensors(folder / "state.safetensors", {"weights/x": torch.zeros(1)}, {"step": "2"})
    with pytest.raises(InputError, match="damaged"):
        train(llama, state=tmp_path / "state")


def test_a_folder_that_cannot_be_written(llama, tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(ResourceError, match="cannot be saved"):
        train(llama, state=tmp_path / "state")
