"""What `--task` says, and the words for what it says wrong."""

import sys
import types
from dataclasses import dataclass

import pytest

from regraft.core.errors import InputError, PluginError, UsageError
from regraft.core.evaluate.condition import read_condition
from regraft.core.evaluate.evaluate import check_conditions, evaluate, failed
from regraft.core.evaluate.harness import Harness
from regraft.core.evaluate.metric import Measured, Measuring, Metric
from regraft.core.evaluate.sample import Sample
from regraft.core.evaluate.tasks import read_tasks
from regraft.core.transformation import Params
from tests.plugin_host import host_with


class LengthParams(Params):
    """Parameters of the metric below."""

    factor: float = 1.0


class Length(Metric[LengthParams]):
    """A stranger's metric: letters of the checkpoint's label."""

    name = "label-length"
    summary = "Letters of the label."
    figures = types.MappingProxyType({"letters": "how many"})
    Params = LengthParams

    def measure(self, subject, params, measuring):
        if params.factor == 0:
            raise ZeroDivisionError("factor")
        return Measured({"letters": Sample.mean(dict.fromkeys(subject.label, params.factor))})


@dataclass
class Named:
    """Stands for an opened checkpoint and for its model."""

    label: str
    window: int = 16

    def load(self):
        return self


EXTRA = {"label-length": Length}


def test_tasks_have_names_data_parameters_and_ids_of_their_own(tmp_path):
    (tmp_path / "my text.txt").write_text("x")
    file = tmp_path / "my text.txt"
    tasks = read_tasks(
        [f"perplexity:'{file}' window=64", f"perplexity:'{file}' id=again", f"perplexity:'{file}'",
         "passkey lengths=64,128 depths=0.5", "label-length factor=2"], EXTRA,
    )  # fmt: skip
    assert [task.id for task in tasks] == ["perplexity", "again", "perplexity-2", "passkey", "label-length"]
    assert (tasks[0].params.data, tasks[0].params.window) == ((str(file),), 64)
    assert (tasks[3].params.lengths, tasks[3].params.depths) == ((64, 128), (0.5,))
    assert tasks[4].params.factor == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexty:a.txt", 'did you mean "perplexity"?'),
        ("perplexity", "write perplexity:DATA"),
        ("perplexity:", "write perplexity:DATA"),
        ("perplexity:missing.txt", "no such file"),
        ("passkey windw=3", "no such parameter"),
        ("passkey sample=3", 'did you mean "samples"?'),
        ("passkey samples=many", "valid integer"),
        ("passkey samples=3 samples=4", "key=value"),
        ("passkey 3", "found: 3"),
        ("passkey needle='x'", "no place for the key"),
        ("passkey 'x", "cannot be read"),
        ("passkey id=base", "is no id"),
        ("", "no such metric"),
    ],
)
def test_other_tasks_are_refused(text, message):
    with pytest.raises(UsageError) as refused:
        read_tasks([text], EXTRA)
    assert message in str(refused.value)


def test_two_models_are_measured_alike_and_conditions_judge_them():
    tasks = read_tasks(["label-length factor=3", "label-length id=other"], EXTRA)
    conditions = [read_condition(text) for text in ("label-length.letters > base", "other.letters > 2")]
    check_conditions(conditions, tasks, against=True)
    outcomes = evaluate(tasks, Named("model"), Named("base"), Measuring())
    assert [outcome.figures["letters"].model.value for outcome in outcomes] == [3.0, 1.0]
    assert failed(conditions, outcomes, against=True) == []
    assert failed([read_condition("label-length.letters >= base")], outcomes, against=True)
    for text, against, message in (
        ("letters > 1", False, "several tasks have this figure"),
        ("nothing > 1", False, "no such figure"),
        ("other.letters > base", False, "there is none"),
    ):
        with pytest.raises(UsageError, match=message):
            check_conditions([read_condition(text)], tasks, against=against)
    with pytest.raises(PluginError, match="the metric failed: ZeroDivisionError"):
        evaluate(read_tasks(["label-length factor=0"], EXTRA), Named("model"), None, Measuring())


def test_a_task_that_compares_needs_a_base(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    tasks = read_tasks([f"divergence:{tmp_path / 'a.txt'}"], {})
    with pytest.raises(UsageError, match="--against"):
        evaluate(tasks, Named("model"), None, Measuring())


def test_the_smaller_window_is_used_for_both():
    seen, told = [], []

    class Window(Length):
        name = "window"

        def measure(self, subject, params, measuring):
            seen.append(measuring.window)
            return super().measure(subject, params, measuring)

    tasks = read_tasks(["window"], {"window": Window})
    evaluate(tasks, Named("model", 64), Named("base", 16), Measuring(tell=told.append))
    assert seen == [16, 16]
    assert "16 and 64" in told[0]


def test_two_plugins_with_one_metric_are_refused_and_a_class_of_another_kind_is_broken():
    assert dict(host_with(regraft_metrics=lambda: [Length]).metrics()) == EXTRA
    with pytest.raises(PluginError, match="two plugins bring the same metric"):
        _ = host_with(regraft_metrics=lambda: [Length, Length]).metrics()
    host = host_with(regraft_metrics=lambda: [int])
    assert host.metrics() == {}
    assert "is not a subclass of Metric" in host.broken["toy"]


def test_figures_of_the_harness_are_drawn_over_its_documents(monkeypatch):
    """The harness itself is an optional extra: what it is called with, and what is made of its answer."""
    scores = {
        "alias": "toy",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": 0.3,
        "odd,none": 7.0,
        "f1,strict match": 1.0,
    }
    documents = [{"doc_id": number, "acc": float(number < 2), "odd": 0.0, "filter": "none"} for number in range(4)]
    counts = {"original": 9, "effective": 4}
    found = {"results": {"toy": scores}, "samples": {"toy": documents}, "n-samples": {"toy": counts}, "versions": {}}
    called = {}
    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = lambda **options: called.update(options) or found
    models, tasks = types.ModuleType("lm_eval.models.huggingface"), types.ModuleType("lm_eval.tasks")
    models.HFLM = lambda **options: types.SimpleNamespace(**options)
    tasks.TaskManager = lambda **options: options
    subject = types.SimpleNamespace(model="m", tokenizer="t", device="cpu")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="not installed"):
        read_tasks(["lm-eval:toy"], {})
    for module in (harness, models, tasks, types.ModuleType("lm_eval.models")):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    measured = Harness().measure(subject, Harness.Params(data="toy", limit=4), Measuring(seed=5))
    assert {name: (one.value, len(one.keys)) for name, one in measured.samples.items()} == {
        "acc": (0.5, 4), "odd": (7.0, 1), "f1:strict_match": (1.0, 1),
    }  # fmt: skip
    assert (called["tasks"], called["limit"], called["torch_random_seed"]) == (["toy"], 4, 5)
    assert called["model"].pretrained == "m"
    assert measured.facts["documents"] == {"toy": 4}
    harness.simple_evaluate = lambda **options: 1 / 0
    with pytest.raises(InputError, match="lm-eval cannot run the task"):
        Harness().measure(subject, Harness.Params(data="toy"), Measuring())
