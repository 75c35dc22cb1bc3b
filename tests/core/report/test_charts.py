"""The geometry of heat maps and charts."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regraft.core.report.chart import interval, line_chart, ticks
from regraft.core.report.heat_map import CLASSES, Cell, Scale, heat_map

MANY = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
FINITE = st.floats(-1e9, 1e9, allow_subnormal=False)


def test_colours_follow_the_logarithm():
    scale = Scale.over([1e-4, 1e-1, 1e3], log=True)
    assert [scale.css(value) for value in (1e-4, 0.99e-3, 1.01e-3, 0.3, 999.0, 1e3)] == [
        "h0",
        "h0",
        "h1",
        "h3",
        "h6",
        "h6",
    ]


@MANY
@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=20), st.booleans())
def test_every_value_has_a_class_and_a_greater_one_no_lower_class(values, log):
    scale = Scale.over(values, log=log)
    classes = [int(scale.css(value)[1:]) for value in sorted(values)]
    assert classes == sorted(classes)
    assert set(classes) <= set(range(CLASSES))
    assert len(scale.legend()) in (1, CLASSES)


def test_noise_among_equals_is_no_pattern():
    scale = Scale.over([0.0921, 0.0932, 0.0934], log=True)
    assert {scale.css(value) for value in (0.0921, 0.0932, 0.0934)} == {"h6"}


def test_values_that_have_no_colour_are_left_out_of_the_scale():
    assert Scale.over([math.inf, math.nan], log=False) is None
    assert Scale.over([0.0, -1.0], log=True) is None
    assert Scale.over([1.0, math.inf, 3.0], log=False).high == 3.0


def test_bounds_of_the_legend_can_be_told_apart():
    texts = [label for _, _, label in Scale.over([100.001, 100.008], log=False).legend()]
    assert len(set(texts)) == CLASSES


def test_eighty_layers_of_ten_roles_fit_a_page():
    rows = [f"role_{number}" for number in range(10)]
    cells = {(row, layer): Cell("0.5", 0.5 + layer) for row in rows for layer in range(80)}
    drawn = heat_map(cells, title="t", rows=rows, columns=80, row_name="role", column_name="layer", log=True)
    assert drawn.label_width + drawn.width < 1080
    assert drawn.cell_width >= 10
    assert [label for label, _ in drawn.columns] == ["0", "10", "20", "30", "40", "50", "60", "70"]
    assert len({(cell.x, cell.y) for cell in drawn.rectangles}) == 800
    assert drawn.rectangles[81].title == "role_1, layer 1: 0.5"
    assert max(cell.x for cell in drawn.rectangles) + drawn.cell_width <= drawn.width


def test_kinds_and_marks_that_occur_are_in_the_legend():
    cells = {("a", 0): Cell("added", css="k-added", glyph="+"), ("a", 1): Cell("0.1", 0.1, mark=True)}
    drawn = heat_map(cells, title="t", rows=["a"], columns=3, row_name="r", column_name="c", log=True,
                     kinds={"k-added": "added", "k-removed": "dropped"})  # fmt: skip
    assert drawn.legend[-2:] == [("k-added", "+", "added"), ("k-mark", "", "chosen")]
    assert drawn.table == [("a", ["added", "0.1", ""])]


@MANY
@given(FINITE, FINITE)
def test_ticks_enclose_what_is_drawn(one, other):
    low, high = sorted((one, other))
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-300)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 12
    assert found[0] <= low + slack
    assert found[-1] >= high - slack


def test_a_line_runs_from_edge_to_edge():
    drawn = line_chart([(0, 4.0), (10, 0.0)], [(0.0, 2.0, "held out")], title="t", x="step", y="loss")
    assert drawn.line == f"{drawn.left}.0,{drawn.top}.0 {drawn.right}.0,{drawn.bottom}.0"
    assert drawn.dots == [(drawn.left, (drawn.top + drawn.bottom) / 2, "held out: 2")]
    assert drawn.table == [("0", "4"), ("10", "0")]


def test_a_long_line_is_thinned_to_means():
    drawn = line_chart([(step, step % 2) for step in range(1, 4801)], title="t", x="step", y="loss")
    assert len(drawn.line.split()) == 1200
    assert len({point.split(",")[1] for point in drawn.line.split()}) == 1
    assert drawn.note == "each point is the mean of 4 steps"
    assert drawn.table[0] == ("1", "1")
    assert drawn.table[-1][0] == "4,800"


def test_nothing_finite_is_no_chart():
    assert line_chart([(1, math.nan)], title="t", x="step", y="loss") is None


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-1.0, 3.0, "no clear difference"),
        (1.0, 3.0, "higher"),
        (-3.0, -1.0, "lower"),
        (0.0, 1.0, "no clear difference"),
    ],
)
def test_an_interval_says_on_which_side_of_zero_it_lies(low, high, words):
    drawn = interval((low + high) / 2, low, high)
    assert drawn.words == words
    assert drawn.low < drawn.value < drawn.high
    assert (drawn.low < 60, drawn.high > 60) == (low < 0, high > 0)
    assert interval(1.0, None, 2.0) is interval(1.0, 0.0, math.inf) is None
