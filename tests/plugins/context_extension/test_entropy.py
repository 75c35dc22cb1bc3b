"""Entropy curves of extended models: the scale of each export is in them, and means are means of rows."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from regraft.core.measures.attention_entropy import attention_entropy
from regraft.core.patch import overlay
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.context_extension.entropy import (
    POINTS,
    ROWS,
    Curves,
    curves,
    entropy_figures,
    entropy_reports,
    rows_of,
)
from regraft.plugins.context_extension.math import entropy_scale, paper_beta, step_scale
from regraft.plugins.context_extension.model import model_of
from tests.plain_entropy import plain_entropy
from tests.plugins.context_extension.support import WINDOW, apply, save, token_ids

LENGTH = 4 * WINDOW


def native(layer: int, position: int) -> float:
    return step_scale(position, WINDOW, paper_beta(WINDOW))


def exact_from(skipped: int, layer: int, position: int) -> float:
    return entropy_scale(position, WINDOW) if layer >= skipped else 1.0


EXPORTS: dict[str, tuple[dict[str, Any], Any]] = {
    "native": ({}, native),
    "remote-code": ({"export": "remote-code", "skip_layers": 0}, partial(exact_from, 0)),
    "remote-code, one layer skipped": ({"export": "remote-code", "skip_layers": 1}, partial(exact_from, 1)),
    "abf-only": ({"export": "abf-only"}, partial(exact_from, 2)),
}


def extended(base: Path, **values: Any) -> Any:
    checkpoint = open_folder(base, label="base")
    patch = apply(checkpoint, **values)
    return model_of(overlay(checkpoint, patch, by="step"), Run("step"), patch)


@pytest.mark.parametrize("export", EXPORTS)
def test_the_scale_of_every_export_is_in_the_entropy(export: str, tmp_path: Path) -> None:
    """Against one query and one key at a time, in double precision, with the scale by its formula."""
    values, factor = EXPORTS[export]
    model = extended(save("llama", tmp_path), **values)
    ids = token_ids(LENGTH)[0].tolist()
    expected = plain_entropy(model, ids, factor)
    for scores in (1, 1 << 26):
        found = attention_entropy(model, ids, range(LENGTH), scores=scores)
        assert (found.double() - expected).abs().max() < 2e-5
    if export != "abf-only":
        unscaled = plain_entropy(model, ids, lambda layer, position: 1.0)
        assert (unscaled - expected).abs()[1, :, WINDOW:].max() > 1e-2
        assert (unscaled - expected).abs()[..., :WINDOW].max() < 1e-12


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_whichever_stock_function_the_code_wraps(implementation: str, tmp_path: Path) -> None:
    model = extended(save("gemma2" if implementation == "eager" else "qwen3", tmp_path), export="remote-code")
    assert model.config._attn_implementation.endswith(implementation)
    found = attention_entropy(model, token_ids(LENGTH)[0].tolist(), range(LENGTH))
    assert found.shape == (2, 4, LENGTH)
    assert found[..., 0].abs().max() < 1e-6


@pytest.mark.parametrize("length", [1, 2, 47, 48, 49, 300, 1000, 5000])
def test_points_are_spread_over_the_whole_text(length: int) -> None:
    groups = rows_of(length)
    rows = [row for group in groups for row in group]
    assert len(groups) == min(POINTS, length)
    assert rows == sorted(set(rows))
    assert rows[-1] == length - 1
    assert all(1 <= len(group) <= ROWS for group in groups)
    if length <= POINTS * ROWS // 2:
        assert rows == list(range(length))


def test_a_point_is_the_mean_of_entropies_over_rows_heads_and_texts(tmp_path: Path) -> None:
    model = extended(save("llama", tmp_path))
    texts = [token_ids(LENGTH, seed=seed)[0].tolist() for seed in range(3)]
    found = curves(model, iter(texts), LENGTH)
    single = [plain_entropy(model, ids, native) for ids in texts]
    for layer in range(2):
        for point, group in enumerate(rows_of(LENGTH)):
            values = [float(one[layer, head, row]) for one in single for head in range(4) for row in group]
            assert found.layers[layer][point] == pytest.approx(sum(values) / len(values), abs=2e-5)
            assert found.positions[point] == pytest.approx(sum(group) / len(group))


def some(layers: int) -> Curves:
    positions = tuple(float(10 * point) for point in range(10))
    return Curves(positions, tuple(tuple(layer + 0.1 * point for point in range(10)) for layer in range(layers)))


def test_figures_leave_out_the_first_two_layers_where_there_are_more() -> None:
    """Of ten points 10 positions apart: three around position 29, and the last three."""
    assert entropy_figures({"before": some(4)}, 30) == {"before": {"at_window": 2.8, "at_target": 3.3}}
    assert entropy_figures({"before": some(2)}, 30) == {"before": {"at_window": 0.8, "at_target": 1.3}}


def test_reports_are_a_table_and_plots_the_same_every_time() -> None:
    measured = {"before": some(40), "after": some(40)}
    reports = {name: file.read() for name, file in entropy_reports(measured).items()}
    assert set(reports) == {"entropy.csv", "entropy.png", "entropy-before.png", "entropy-after.png"}
    lines = reports["entropy.csv"].decode().splitlines()
    assert lines[:3] == ["model,layer,position,entropy", "before,0,0,0.0", "before,0,10,0.1"]
    assert len(lines) == 1 + 2 * 40 * 10
    assert all(png.startswith(b"\x89PNG") for name, png in reports.items() if name.endswith(".png"))
    assert reports == {name: file.read() for name, file in entropy_reports(measured).items()}
