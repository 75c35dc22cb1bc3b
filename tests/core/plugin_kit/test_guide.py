"""The guide to plugins: its examples work, and its table names every check."""

import re
from pathlib import Path

from regraft.core.evaluate.metric import Measuring
from regraft.core.loaded import Loaded
from regraft.core.sources import open_checkpoint
from regraft.core.testing.conformance.suite import CHECKS
from tests.families import tiny

GUIDE = (Path(__file__).parents[3] / "docs" / "guide" / "plugins.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


def test_the_transformation_of_the_guide_passes_the_test_of_the_guide(tmp_path):
    names = {"__name__": "guide"}
    transformation, test, conformance = BLOCKS[:3]
    for block in (transformation, test, conformance):
        exec(block, names)
    names["test_rows_are_halved"](tmp_path)
    assert names["TestConformance"].transformation is names["ScaleEmbeddings"]
    assert names["regraft_transformations"]() == [names["ScaleEmbeddings"]]


def test_the_metric_of_the_guide_measures(tiny_folder):
    from transformers import AutoTokenizer

    names = {"__name__": "guide"}
    exec(BLOCKS[3], names)
    kind = names["TokenShare"]
    folder = tiny_folder("llama")
    subject = Loaded(
        open_checkpoint(str(folder)), tiny("llama"), AutoTokenizer.from_pretrained(folder), "cpu", "float32"
    )
    measured = kind().measure(subject, kind.Params(data="a river"), Measuring())
    assert 0 < measured.samples["share"].value < 1


def test_the_table_names_every_check_and_what_it_says():
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \|$", GUIDE)
    assert rows == [(check.name, check.holds) for check in CHECKS]
