"""Lines, JSON log and TensorBoard."""

import json
import sys

import pytest

from regraft.core.errors import ResourceError, UsageError
from regraft.core.training.loop import Records
from regraft.core.training.progress import JsonLog, Progress, TensorBoardLog, telling
from tests.core.training.support import batches, fit, model_of, sequences


def progress(step, steps=4):
    return Progress(step, steps, 2.5, 1e-3, 0.5, 100 * step, 50.0, 3661.0, {"accuracy": 0.75})


def test_a_line_says_step_loss_speed_and_what_is_left():
    assert str(progress(3)) == "step 3/4  loss 2.5  accuracy 0.75  50 tokens/s  01:01:01 left"


def test_lines_are_told_now_and_then():
    told = []
    listen = telling(told.append, every_seconds=1000)
    for step in range(1, 5):
        listen(progress(step))
    assert [line.split()[1] for line in told] == ["1/4", "4/4"]
    always = telling(told.append, every_seconds=0)
    always(progress(2))
    assert told[-1].startswith("step 2/4")


def test_log_of_a_training(llama, tmp_path):
    log, seen = tmp_path / "logs" / "train.jsonl", []
    report = fit(model_of(llama), batches(sequences(8, 6), batch_size=2), log_every=3, schedule="linear",
                 records=Records(log=log, listen=seen.append))  # fmt: skip
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4]
    assert [line["loss"] for line in lines] == [report.losses[2], report.losses[3]]
    assert [line["lr"] for line in lines] == [5e-4, 2.5e-4]
    assert [one.tokens for one in seen] == [12, 24, 36, 48]
    assert all(one.tokens_per_second > 0 and one.gradient_norm > 0 for one in seen)
    assert seen[-1].eta_seconds == 0 < seen[0].eta_seconds


def test_log_goes_on_after_a_resume(tmp_path):
    path = tmp_path / "train.jsonl"
    first = JsonLog(path)
    for step in (1, 2, 3):
        first(progress(step))
    first.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    second = JsonLog(path, done=2)
    second(progress(3))
    second.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    JsonLog(path).close()
    assert path.read_text() == "", "a training from the start begins its log anew"


def test_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="log cannot be written"):
        JsonLog(tmp_path / "file" / "train.jsonl")


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        TensorBoardLog(tmp_path)
    assert "regraft[tensorboard]" in caught.value.remedy


@pytest.mark.filterwarnings("ignore")
def test_tensorboard(llama, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = fit(model_of(llama), batches(sequences(8, 6), batch_size=4), records=Records(tensorboard=tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [one.step for one in events.Scalars("loss")] == [1, 2]
    assert [one.value for one in events.Scalars("loss")] == pytest.approx(list(report.losses), rel=1e-6)
