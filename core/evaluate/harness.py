"""Tasks of lm-eval, the Language Model Evaluation Harness, which is an optional extra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from regraft.core.errors import InputError, RegraftError, UsageError
from regraft.core.evaluate.metric import Measured, Measuring, Metric
from regraft.core.evaluate.sample import Sample
from regraft.core.transformation import Params

if TYPE_CHECKING:
    from regraft.core.loaded import Loaded


class HarnessParams(Params):
    """A task of the harness."""

    data: str = Field(min_length=1, description="Name of the task, such as arc_easy.")
    few_shot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Examples in the prompt. Default: the task's."
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Only the first so many documents.")
    include: str | None = Field(None, description="A folder with tasks of your own.")
    chat: bool = Field(False, description="Write prompts in the model's chat template.")


class Harness(Metric[HarnessParams]):
    """Whatever figures the task has, drawn over its documents where it tells one for each."""

    name = "lm-eval"
    summary = "A task of lm-eval (pip install 'regraft[lm-eval]'), as lm-eval:NAME."
    figures: ClassVar[Mapping[str, str]] = {}
    Params = HarnessParams

    def check(self, params: HarnessParams) -> None:
        """Whether the harness is installed."""
        del params
        if find_spec("lm_eval") is None:
            raise UsageError(
                "the harness is not installed", where="--task lm-eval", expected="the package lm-eval",
                remedy="pip install 'regraft[lm-eval]'",
            )  # fmt: skip

    def measure(self, subject: Loaded, params: HarnessParams, measuring: Measuring) -> Measured:
        """Hand model and tokenizer to the harness.

        Raises:
            InputError: the harness has no such task, or cannot run it.
        """
        measuring.tell(f"lm-eval: {params.data}")
        try:
            found = _evaluated(subject, params, measuring)
        except RegraftError:
            raise
        except Exception as error:  # the harness raises what it likes
            raise InputError(
                "lm-eval cannot run the task", where=f"--task lm-eval:{params.data}",
                found=f"{type(error).__name__}: {error}"[:500],
                remedy="see `lm-eval ls tasks`; its data comes from the hub, or from your folder with include=",
            ) from None  # fmt: skip
        samples = {name: sample for task in sorted(found["results"]) for name, sample in _samples(found, task, params)}
        counts = {task: count["effective"] for task, count in found.get("n-samples", {}).items()}
        return Measured(samples, {"documents": counts, "versions": dict(found.get("versions", {}))})


def _evaluated(subject: Loaded, params: HarnessParams, measuring: Measuring) -> Any:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=measuring.batch_size, device=subject.device
    )
    seeds = dict.fromkeys(
        ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), measuring.seed
    )
    return lm_eval.simple_evaluate(
        model=model,
        tasks=[params.data],
        num_fewshot=params.few_shot,
        limit=params.limit,
        task_manager=TaskManager(include_path=params.include),
        apply_chat_template=params.chat,
        log_samples=True,
        bootstrap_iters=0,
        **seeds,
    )


def _samples(found: Any, task: str, params: HarnessParams) -> Iterator[tuple[str, Sample]]:
    """The figures of a task: means over its documents where those give the harness's own value, else that alone."""
    documents = (found.get("samples") or {}).get(task, ())
    for key, value in found["results"][task].items():
        metric, _, way = key.partition(",")
        if not isinstance(value, int | float) or metric == "sample_len" or metric.endswith("_stderr"):
            continue
        name = metric if task == params.data else f"{task}/{metric}"
        name = name if way in ("", "none") else f"{name}:{way.replace(' ', '_')}"
        own = {str(one["doc_id"]): one.get(metric) for one in documents if one.get("filter", "none") == (way or "none")}
        sample = Sample.mean({key: float(one) for key, one in own.items()}) if own and _numbers(own) else None
        if sample is None or abs(sample.value - value) > 1e-6 * max(1.0, abs(value)):
            sample = Sample([float(value)], [1.0], ["all"])
        yield name, sample


def _numbers(values: Mapping[str, Any]) -> bool:
    return all(isinstance(one, int | float) for one in values.values())
