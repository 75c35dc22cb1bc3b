"""The page in the manual says what the code does, and the command line takes what the page shows."""

import json
import re
from pathlib import Path

import pytest

from regraft.plugins.fourier_head import FourierHead
from regraft.plugins.fourier_head.families import FAMILIES
from regraft.plugins.fourier_head.params import FourierHeadParams
from tests.running import done, regraft, tree, write_recipe

DOCS = Path(__file__).parents[3] / "docs"
PAGE, BENCHMARKS = DOCS / "concepts" / "fourier-head.md", DOCS / "benchmarks.md"


def test_the_families_and_the_keys():
    text = PAGE.read_text()
    (families,) = re.findall(r"^Families: (.+?)\.", text, re.MULTILINE)
    assert families.replace("\n", " ").split(", ") == list(FAMILIES)
    fields = FourierHeadParams.model_fields
    for key, written in re.findall(r"^\| `(\w+)` \| ([\w.-]+) \|", text, re.MULTILINE):
        default = fields[key].default
        if written not in ("none", "midpoint"):
            assert str(default).lower() == written.lower() or float(default) == float(written), key
        else:
            assert default is None, key


def test_the_examples_are_valid(tmp_path):
    import tomllib

    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        found = tomllib.loads(block)
        step = found["steps"][0] if "steps" in found else {"use": "fourier-head", "tokens": "0..9", **found}
        FourierHead.Params(**{key: value for key, value in step.items() if key != "use"})


def test_the_measured_figures_lie_in_the_bands():
    """What the toy table must show to be a reproduction; the authors' figures scatter as much."""
    bands = {
        ("gaussian", "KL"): (0.05, 0.17),
        ("gmm2", "KL"): (0.10, 0.20),
        ("beta", "KL"): (0.16, 0.23),
        ("gaussian", "smoothness"): (0.052, 0.060),
        ("gmm2", "smoothness"): (0.033, 0.041),
        ("beta", "smoothness"): (0.072, 0.080),
    }
    truths = {"gaussian": 0.0696, "gmm2": 0.0480, "beta": 0.1075}
    rows = re.findall(r"^\| (gaussian|gmm2|beta) \| (KL|smoothness) \|(.+)\|$", BENCHMARKS.read_text(), re.MULTILINE)
    assert len(rows) == 6
    for data, figure, rest in rows:
        *cells, truth = rest.split("|")
        linear, mixture, fourier = (float(cell.split()[0]) for cell in cells)
        low, high = bands[data, figure]
        assert low <= fourier <= high
        assert fourier < linear
        if figure == "KL":
            assert (mixture < fourier) == (data != "beta")
        else:
            assert float(truth) == pytest.approx(truths[data], rel=0.03), "the data are those of the paper"


def test_the_measured_speeds_are_those_promised():
    """At 4096 bins and 550 frequencies fifty times, at the toy's size three times as fast as the paper's layer."""
    rows = re.findall(
        r"^\| ([\d, ]+) \| (all bins|one bin) \| [\d.]+ \| ([\d.]+) \|", BENCHMARKS.read_text(), re.MULTILINE
    )
    times = {(size, form): float(value) for size, form, value in rows}
    assert min(times["256, 4096, 550, 8", form] for form in ("all bins", "one bin")) >= 50
    assert times["32, 50, 12, 32", "one bin"] >= 3


def test_a_recipe_from_end_to_end(workplace):
    step = {"use": "fourier-head", "tokens": "0..9", "num_frequencies": 4}
    recipe = write_recipe(Path("head.toml"), "base", step, path="out")
    plan = json.loads(done("plan", recipe, "--json").out)
    done("apply", recipe)
    assert "trust_remote_code=True" in done("plan", recipe).out
    assert any("density" in note for step in plan["steps"] for note in step["notes"])
    assert done("verify", "out").code == 0
    assert "fourier_llama" in done("inspect", "out").out
    before = tree(Path("out"))
    write_recipe(Path("wrong.toml"), "base", {**step, "tokens": "0..10"}, path="other")
    failed = regraft("apply", "wrong.toml")
    assert failed.code == 2
    assert "the vocabulary does not have all these tokens" in failed.err
    assert "Traceback" not in failed.err
    assert not Path("other").exists()
    again = regraft("apply", write_recipe(Path("again.toml"), "out", step, path="twice"))
    assert again.code == 1
    assert "has a Fourier head already" in again.err
    assert tree(Path("out")) == before


@pytest.mark.parametrize("gone", ["torch", "transformers"])
def test_plans_without(gone, workplace):
    """Check and plan import neither torch nor transformers."""
    from tests.helpers import run_python

    write_recipe(Path("head.toml"), "base", {"use": "fourier-head", "bins": 20}, path="out")
    program = """
        import sys
        from regraft.cli.main import run
        try:
            run(["plan", "head.toml"])
        except SystemExit as ending:
            assert not ending.code
        assert sys.argv[1] not in sys.modules
    """
    assert "20 bins of a density" in run_python(program, gone)
