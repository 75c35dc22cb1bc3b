"""`probe` measures and changes nothing, says in the plan that it will, and gives the same bytes again."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from regraft.core.demo import TINY
from regraft.core.errors import InputError, Unsupported, UsageError
from regraft.core.patch import Patch, overlay
from regraft.core.sources.folder import open_folder
from regraft.core.transformation import Run
from regraft.plugins.context_extension import ContextExtension
from regraft.plugins.context_extension.model import model_of
from regraft.plugins.context_extension.settings import ProbeSettings
from tests.materialise import materialise
from tests.plugins.context_extension.support import params, rewrite_config, save
from tests.plugins.context_extension.test_passkey import RECALL

SMALL = {**RECALL, "samples": 1, "lengths": (128, 1024), "depths": (0.5,)}


def demo(run: Run | None = None, **values: Any) -> tuple[Any, Patch]:
    """The outline and the patch of a step on demo:tiny, extended four times."""
    checkpoint, step = open_folder(TINY, label="demo:tiny"), ContextExtension()
    given = params(target_length=1024, **values)
    step.check(checkpoint, given)
    return step.plan(checkpoint, given), step.apply(checkpoint, given, run or Run("step"))


@pytest.mark.parametrize("values", [{"method": "yarn"}, {"export": "remote-code"}, {"logit_scale": 2.0}],
                         ids=["config only", "code", "edits"])  # fmt: skip
def test_nothing_changes_but_what_is_reported(values: dict[str, Any]) -> None:
    outline, patch = demo(probe=SMALL, **values)
    plain_outline, plain = demo(**values)
    assert outline.deviations(patch) == []
    assert plain_outline.deviations(patch) == []
    assert set(patch.edits) == set(plain.edits)
    assert {**patch.metrics, "probe": None} == {**plain.metrics, "probe": None}
    assert patch.notes[: len(plain.notes)] == plain.notes
    base = open_folder(TINY, label="demo:tiny")
    ours, theirs = overlay(base, patch, by="step"), overlay(base, plain, by="step")
    assert {name: file.read() for name, file in ours.files.items()} == {
        name: file.read() for name, file in theirs.files.items()
    }
    for name in ours.specs:
        assert (ours.load(name) == theirs.load(name)).all()
    assert plain.reports == {}
    assert sorted(patch.reports) == [
        "entropy-after.png", "entropy-before.png", "entropy.csv", "entropy.png", "passkey-after.png",
        "passkey-before.png", "passkey.csv",
    ]  # fmt: skip


def test_what_the_extension_does_shows_and_is_told() -> None:
    """Beyond the window the entropy of the base grows, and it forgets; the extended model does neither as much.

    The scale is what holds the entropy: under the larger base alone it grows (2401.07004, figure 1).
    """
    heard: list[str] = []
    entropy = {**SMALL, "passkey": False, "samples": 2}
    rises = {}
    for method in ("entropy-abf", "abf"):
        one = demo(probe=entropy, method=method)[1].metrics["probe"]["entropy"]["after"]
        rises[method] = one["at_target"] - one["at_window"]
    assert rises["entropy-abf"] < rises["abf"] - 0.3
    beyond = {**SMALL, "lengths": (512,), "depths": (0.25, 0.75), "samples": 3}
    _, patch = demo(Run("step", tell=heard.append), probe=beyond)
    probe = patch.metrics["probe"]
    before, after = probe["entropy"]["before"], probe["entropy"]["after"]
    assert before["at_target"] - before["at_window"] > after["at_target"] - after["at_window"] + 0.3
    assert probe["passkey"]["before"]["beyond"]["mean_rank"] > probe["passkey"]["after"]["beyond"]["mean_rank"] + 1
    assert patch.notes[-1].startswith("the passkey is the likeliest of 10 keys in texts beyond the old window of 256")
    assert patch.notes[-2].startswith("attention entropy from position 256 to 1024, mean of layers from 2, in nats: ")
    assert heard[:2] == ["probe before: loading the model", "probe before: attention entropy, text 1 of 3"]
    assert "probe after: passkey: 6 texts of 512 tokens" in heard


def test_the_same_run_gives_the_same_bytes() -> None:
    one, two = (demo(probe={**SMALL, "passkey": name == "passkey", "entropy": name == "entropy"})[1]
                for name in ("passkey", "passkey"))  # fmt: skip
    assert one.metrics == two.metrics
    assert {name: file.read() for name, file in one.reports.items()} == {
        name: file.read() for name, file in two.reports.items()
    }
    assert sorted(one.reports) == ["passkey-after.png", "passkey-before.png", "passkey.csv"]
    assert json.dumps(one.metrics, allow_nan=False)
    other = demo(Run("step", seed=1), probe={**SMALL, "entropy": False})[1]
    assert other.reports["passkey.csv"].read() != one.reports["passkey.csv"].read()


def test_true_needs_nothing_else() -> None:
    """Numbers as keys, at a quarter, a half, three quarters and all of the target; demo:tiny knows no numbers."""
    settings = params(target_length=1024, probe=True).probing
    assert settings == ProbeSettings()
    assert settings.lengths_for(1024) == (256, 512, 768, 1024)
    patch = ContextExtension().apply(
        open_folder(TINY, label="demo:tiny"),
        params(target_length=300, probe={"samples": 1, "depths": (0.0, 1.0)}),
        Run("step"),
    )
    assert set(patch.metrics["probe"]["passkey"]["after"]) == {"inside", "beyond"}
    lines = patch.reports["passkey.csv"].read().decode().splitlines()
    assert [line.split(",")[:3] for line in lines[1:9]] == [
        ["before", str(length), depth] for length in (75, 150, 225, 300) for depth in ("0", "1")
    ]
    assert len(lines) == 1 + 2 * 4 * 2


def test_the_plan_says_so_and_counts_the_memory() -> None:
    checkpoint, step = open_folder(TINY, label="demo:tiny"), ContextExtension()
    plain = step.plan(checkpoint, params(target_length=1024))
    probed = step.plan(checkpoint, params(target_length=1024, probe=True))
    longer = step.plan(checkpoint, params(target_length=4096, probe=True))
    assert plain.workspace_bytes == 0
    assert probed.specs == plain.specs == {}
    assert probed.notes[-1] == "probes the model before and after, in texts of up to 1024 tokens"
    size = sum(spec.numel * 4 for spec in checkpoint.specs.values())
    assert size < probed.workspace_bytes < longer.workspace_bytes


def test_a_text_that_is_not_there_is_refused_by_check() -> None:
    checkpoint = open_folder(TINY, label="demo:tiny")
    with pytest.raises(UsageError, match="no such file") as raised:
        ContextExtension().check(checkpoint, params(target_length=1024, probe={"text": Path("nowhere.txt")}))
    assert raised.value.where == "probe.text"


def test_a_checkpoint_without_a_tokenizer(tmp_path: Path) -> None:
    base = open_folder(save("llama", tmp_path), label="base")
    with pytest.raises(InputError, match="no tokenizer"):
        ContextExtension().apply(base, params(probe=True), Run("step"))


def test_code_of_others_does_not_run_unless_trusted(tmp_path: Path) -> None:
    """Neither that of the base, nor that beside ours."""
    folder = save("llama", tmp_path / "base")
    checkpoint = open_folder(folder, label="base")
    given = params(export="remote-code")
    ours = ContextExtension().apply(checkpoint, given, Run("step"))
    assert type(model_of(overlay(checkpoint, ours, by="step"), Run("step"), ours)).__name__ == "EntropyAbfForCausalLM"
    (folder / "other.py").write_text("raise SystemExit")
    foreign = open_folder(folder, label="base")
    with pytest.raises(Unsupported, match="may not run"):
        model_of(overlay(foreign, ours, by="step"), Run("step"), ours)
    (folder / "other.py").unlink()
    mapped = open_folder(rewrite_config(folder, {"auto_map": {"AutoConfig": "other.Config"}}), label="base")
    patch = ContextExtension().apply(mapped, given, Run("step"))
    with pytest.raises(Unsupported, match="may not run"):
        model_of(overlay(mapped, patch, by="step"), Run("step"), patch)
    rewrite_config(folder, {"auto_map": {"AutoModelForCausalLM": "other.Model"}})
    with pytest.raises(Unsupported, match="may not run"):
        model_of(open_folder(folder, label="base"), Run("step"))


def test_an_extended_checkpoint_is_measured_again_as_what_it_is(tmp_path: Path) -> None:
    """Code that an earlier step wrote runs where the run trusts it."""
    base = open_folder(TINY, label="demo:tiny")
    patch = demo(export="remote-code")[1]
    folder = materialise(overlay(base, patch, by="step"), tmp_path / "out")
    model = model_of(open_folder(folder, label="out"), Run("step", trust=True))
    assert type(model).__name__ == "EntropyAbfForCausalLM"


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"entropy": False, "passkey": False}, "nothing is measured"),
        ({"needle": "no place"}, "no place for the key"),
        ({"question": "the key is {key}"}, "where the key follows"),
        ({"question": "the key is "}, "where the key follows"),
        ({"answers": ("a", "b", "b"), "choices": 3}, "fewer than choices"),
        ({"lengths": (2000,)}, "beyond target_length"),
        ({"lengths": ()}, "at least 1 item"),
        ({"depths": (1.5,)}, "less than or equal to 1"),
        ({"samples": 0}, "greater than or equal to 1"),
        ({"what": 1}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense(probe: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        params(target_length=1024, probe=probe)


def test_a_weight_of_16_bits_is_read_as_it_is_where_that_is_fast() -> None:
    from regraft.core.training.modes import bf16_is_fast
    from regraft.plugins.context_extension.probe import Probe

    checkpoint = open_folder(TINY, label="demo:tiny")
    auto = Probe(ProbeSettings(), None, 256, 1024, Run("step"))
    assert auto._dtype(checkpoint) == ("bfloat16" if bf16_is_fast("cpu") else "float32")
    full = Probe(ProbeSettings(precision="float32"), None, 256, 1024, Run("step"))
    assert full._dtype(checkpoint) == "float32"
