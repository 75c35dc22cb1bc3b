"""The page in the manual says what the code does."""

import re
from pathlib import Path

from regraft.plugins.attention_calibration.families import FAMILIES
from regraft.plugins.attention_calibration.params import AttentionCalibrationParams

PAGE = (Path(__file__).parents[3] / "docs" / "concepts" / "attention-calibration.md").read_text()


def test_families_and_keys() -> None:
    (families,) = re.findall(r"^Families: (.+)\.$", PAGE, re.MULTILINE)
    assert families.split(", ") == list(FAMILIES)
    keys = set(re.findall(r"`([a-z_]+)(?: = [^`]+)?`", PAGE)) & set(AttentionCalibrationParams.model_fields)
    assert keys >= {
        "data",
        "held_out",
        "heads",
        "min_queries",
        "spare_first",
        "tau_mode",
        "scope",
        "passes",
        "min_gain",
    }
