"""The page in the manual says what the code does."""

import re
from pathlib import Path

from regraft.plugins.context_extension.families import FAMILIES
from regraft.plugins.context_extension.math import deviation, fit_beta, paper_beta

PAGE = Path(__file__).parents[3] / "docs" / "concepts" / "context-extension.md"


def test_the_table_of_deviations() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d) \|(.+)\|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 9
    for window, factor, rest in rows:
        c, length = int(window), int(window) * int(factor)
        slopes = paper_beta(c), fit_beta(c, length)
        figures = [number for slope in slopes for number in (slope, *deviation(c, length, slope))]
        written = [cell.strip() for cell in rest.split("|")]
        assert written == [f"{number:.{4 if index % 3 == 0 else 3}f}" for index, number in enumerate(figures)]


def test_the_families_with_code() -> None:
    (cell,) = re.findall(r"^\| `remote-code` .*\| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert set(cell.split(", ")) == {name for name, family in FAMILIES.items() if family.attention}
