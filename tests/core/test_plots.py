"""Plots: valid PNG, the same bytes every time, other values other pixels."""

import subprocess
import sys

import pytest
from matplotlib.image import imread

from regraft.core.plots import bar_chart, fan_chart, heat_map, line_chart, loss_curve

PLOTS = {
    "loss": lambda shift: loss_curve([3.0 + shift, 2.0, 1.5], title="loss"),
    "one step": lambda shift: loss_curve([3.0 + shift, 1.0][: 1 + (shift > 0)], title="loss"),
    "held out": lambda shift: loss_curve([3.0, 2.0], title="loss", held_out={0: 3.1, 2: 2.9 + shift}),
    "lines": lambda shift: line_chart(
        {f"layer {n}": ([1, 10, 100], [n, n + 1 + shift, n]) for n in range(3)}, title="t", x="x", y="y", log_x=True
    ),
    "many lines": lambda shift: line_chart(
        {f"layer {n}": ([1, 2], [n, n + shift]) for n in range(40)}, title="t", x="x", y="y"
    ),
    "fan": lambda shift: fan_chart(
        [1, 2, 1], [3, 2], [2, 2 + shift], {0.5: ([1, 1], [3, 3]), 0.95: ([0, 0], [4, 5])}, title="t", x="x", y="y"
    ),
    "fan without a past": lambda shift: fan_chart([], [3, 2], [2, 2 + shift], {}, title="t", x="x", y="y"),
    "bars": lambda shift: bar_chart({f"{n}.txt": {"old": 3, "new": 2 + shift} for n in range(3)}, title="t", y="y"),
    "no lines": lambda shift: line_chart({}, title=f"t{shift}", x="x", y="y"),
    "map": lambda shift: heat_map([[0, 1 + shift], [float("nan"), 3]], title="t", x="head", y="layer", marks=[(1, 1)]),
    "named map": lambda shift: heat_map(
        [[0.5 * shift] * 60], title="t", x="x", y="y", x_ticks=[str(n) for n in range(60)], y_ticks=["a"], bounds=(0, 1)
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_same_values_same_bytes_and_other_values_other_pixels(name, tmp_path):
    pictures = []
    for shift in (0, 0, 1):
        path = tmp_path / "plot.png"
        path.write_bytes(PLOTS[name](shift))
        pictures.append((path.read_bytes(), imread(path)))
    assert pictures[0][0] == pictures[1][0]
    assert pictures[0][1].shape == pictures[2][1].shape
    assert (pictures[0][1] != pictures[2][1]).any()
    assert b"matplotlib" not in pictures[0][0].lower()


def test_a_mark_frames_its_cell(tmp_path):
    plain, marked = (heat_map([[0, 1], [2, 3]], title="t", x="x", y="y", marks=marks) for marks in ((), [(0, 1)]))
    (tmp_path / "a.png").write_bytes(plain)
    (tmp_path / "b.png").write_bytes(marked)
    differing = (imread(tmp_path / "a.png") != imread(tmp_path / "b.png")).any(2).nonzero()
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert differing[0].max() < height * 0.6
    assert differing[1].min() > width * 0.3


def test_without_a_home_nothing_is_said_and_the_user_s_settings_change_nothing(tmp_path):
    code = (
        "import sys; from regraft.core.plots import loss_curve; sys.stdout.buffer.write(loss_curve([1.0], title='t'))"
    )
    settings = tmp_path / "matplotlibrc"
    settings.write_text("lines.linewidth: 9\n")
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, timeout=60)
        for environment in ({"HOME": "/nonexistent"}, {"HOME": str(tmp_path), "MATPLOTLIBRC": str(settings)})
    ]
    assert runs[0].stderr == runs[1].stderr == b""
    assert runs[0].stdout == runs[1].stdout
