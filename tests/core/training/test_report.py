"""What a training step reports, and what the plan says of its memory."""

import json

from regraft.core.sources import open_checkpoint
from regraft.core.training.footprint import model_bytes, state_bytes, training_bytes
from regraft.core.training.loop import Report
from regraft.core.training.report import report_metrics, training_reports

REPORT = Report((2.0, 1.0), 2, 4, 64, 1.25, 0, "stop_loss", "float32")


def test_losses_as_a_plot_and_as_lines():
    reports = training_reports(REPORT, "stage 1", prefix="stage-1-")
    assert set(reports) == {"stage-1-loss.png", "stage-1-losses.jsonl"}
    lines = reports["stage-1-losses.jsonl"].read().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert reports["stage-1-loss.png"].read().startswith(b"\x89PNG")


def test_metrics_are_json_and_hold_no_time():
    metrics = report_metrics(REPORT)
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert metrics == report_metrics(Report((2.0, 1.0), 2, 4, 64, 99.0, 1, "stop_loss", "float32"))
    assert (metrics["first_loss"], metrics["final_loss"], metrics["stopped"]) == (2.0, 1.0, "stop_loss")
    empty = report_metrics(Report((), 0, 0, 0, 0.0, 0, "", "float32"))
    assert (empty["final_loss"], empty["stopped"]) == (None, "end of the data")


def test_the_footprint_counts_weights_gradients_moments_average_and_activations(tiny_folder):
    checkpoint = open_checkpoint(str(tiny_folder()))
    numbers = sum(tensor.spec.nbytes // 4 for tensor in checkpoint.tensors.values())
    assert model_bytes(checkpoint) > 4 * numbers
    plain = training_bytes(checkpoint, tokens=0)
    assert plain - model_bytes(checkpoint) == 12 * numbers
    assert training_bytes(checkpoint, tokens=0, ema=True) - plain == 4 * numbers
    assert state_bytes(100) == 2 * 1200
    assert state_bytes(100, ema=True) == 2 * 1600
    assert training_bytes(checkpoint, 100, tokens=0) - model_bytes(checkpoint) == 1200
    hidden, layers = checkpoint.config["hidden_size"], checkpoint.config["num_hidden_layers"]
    assert training_bytes(checkpoint, tokens=10) - plain == 34 * hidden * layers * 10 * 2
