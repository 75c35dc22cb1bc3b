"""Colours: text has the contrast of WCAG AA in light, dark and print."""

import re

import pytest

from regraft.core.report.page import TEMPLATES

CSS = (TEMPLATES / "style.css").read_text()
THEMES = {
    "light": CSS[: CSS.index("@media screen and (prefers-color-scheme: dark)")],
    "dark": CSS[CSS.index("@media screen and (prefers-color-scheme: dark)") : CSS.index("* { box-sizing")],
    "print": CSS[CSS.index("@media print") :],
}


def colours(theme):
    light = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", THEMES["light"]))
    return light | dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", THEMES[theme]))


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read(theme):
    found = colours(theme)
    for text in ("ink", "muted", "accent", "good", "bad"):
        assert contrast(found[text], found["paper"]) >= 4.5, text
    assert contrast(found["ink"], found["wash"]) >= 4.5
    assert contrast(found["glyph"], found["paper"]) >= 4.5
    assert contrast(found["glyph"], found["h3"]) >= 3 or theme == "dark"


@pytest.mark.parametrize("theme", THEMES)
def test_the_ramp_rises_away_from_the_paper(theme):
    found = colours(theme)
    steps = [contrast(found[f"h{step}"], found["paper"]) for step in range(7)]
    assert steps == sorted(steps)
    assert steps[-1] >= 7
