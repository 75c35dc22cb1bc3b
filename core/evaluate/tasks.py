"""What the user asks to measure: `NAME[:DATA] [key=value ...]`, as metric and parameters."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from regraft.core.errors import UsageError
from regraft.core.evaluate.condition import BASE
from regraft.core.recipe.suggest import did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel

    from regraft.core.evaluate.metric import AnyMetric

_DATA = "data"
_ID = "id"


@dataclass(frozen=True)
class Task:
    """One use of a metric.

    Args:
        id: what tables and conditions call it; the metric's name unless the task says otherwise.
        metric: that measures.
        params: its own.
    """

    id: str
    metric: AnyMetric
    params: BaseModel


def built_in_metrics() -> list[type[AnyMetric]]:
    """Our own metrics."""
    from regraft.core.evaluate.choices import Choices
    from regraft.core.evaluate.divergence import Divergence
    from regraft.core.evaluate.forecast import Forecast
    from regraft.core.evaluate.harness import Harness
    from regraft.core.evaluate.passkey import Passkey
    from regraft.core.evaluate.perplexity import Perplexity
    from regraft.core.evaluate.preference import Preference
    from regraft.core.evaluate.variety import Variety

    return [Perplexity, Choices, Passkey, Preference, Variety, Divergence, Forecast, Harness]


def read_tasks(texts: Sequence[str], extra: Mapping[str, type[AnyMetric]]) -> list[Task]:
    """The tasks that `texts` name, each with an id of its own.

    Args:
        texts: such as `perplexity:held-out.txt window=512`.
        extra: metrics of plugins, by name; ours stay ours.

    Raises:
        UsageError: no such metric or parameter, a value of another kind, or an id given twice.
        InputError: data that cannot be read.
    """
    kinds = {**extra, **{kind.name: kind for kind in built_in_metrics()}}
    tasks: list[Task] = []
    for text in texts:
        task = _task(text, kinds)
        taken = {other.id for other in tasks}
        if task.id in taken:
            if _ID in _words(text)[1]:
                raise UsageError("two tasks have the same id", where="--task", found=task.id, remedy="name them apart")
            task = replace(task, id=next(new for n in range(2, 10_000) if (new := f"{task.id}-{n}") not in taken))
        tasks.append(task)
    for task in tasks:
        task.metric.check(task.params)
    return tasks


def _task(text: str, kinds: Mapping[str, type[AnyMetric]]) -> Task:
    name, given = _words(text)
    if name not in kinds:
        remedy = did_you_mean(name, kinds) or f"name one of {', '.join(kinds)}"
        raise UsageError("there is no such metric", where=f"--task {text}", found=name, remedy=remedy)
    kind = kinds[name]
    own = given.pop(_ID, name)
    if not own.replace("-", "").replace("_", "").isalnum() or own == BASE or not own[0].isalpha():
        raise UsageError(
            "is no id", where=f"--task {text}: id", expected="letters, digits, - and _, and not base", found=own
        )
    return Task(own, kind(), _params(kind, given, text))


def _words(text: str) -> tuple[str, dict[str, str]]:
    """The metric's name, and every `key=value`, `data` among them."""
    try:
        words = shlex.split(text)
        if "\0" in text:
            raise ValueError("it holds the character U+0000")
    except ValueError as error:
        raise UsageError(
            "the task cannot be read",
            where=f"--task {text}",
            found=error,
            remedy="close the quote, and leave out what is no text",
        ) from None
    head, *rest = words or [""]
    name, _, source = head.partition(":")
    given = {_DATA: source} if source else {}
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals or key in given:
            raise UsageError(
                "a task is a metric with its data, and then key=value",
                where=f"--task {text}",
                expected="such as perplexity:held-out.txt window=512",
                found=word,
            )
        given[key] = value
    return name, given


def _params(kind: type[AnyMetric], given: Mapping[str, str], text: str) -> BaseModel:
    properties: Mapping[str, Any] = kind.Params.model_json_schema().get("properties", {})
    unknown = [key for key in given if key not in properties]
    if unknown:
        known = ", ".join(properties)
        remedy = did_you_mean(unknown[0], properties) or (f"it has {known}" if known else "it has no parameters")
        raise UsageError("the metric has no such parameter", where=f"--task {text}", found=unknown[0], remedy=remedy)
    values = {key: value.split(",") if _is_list(properties[key]) else value for key, value in given.items()}
    try:
        params: BaseModel = kind.Params.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "missing":
            remedy = f"write {kind.name}:DATA" if key == _DATA else f"write {key}=..."
            raise UsageError(f"the metric needs {key}", where=f"--task {text}", remedy=remedy) from None
        raise UsageError(
            first["msg"].removeprefix("Value error, "),
            where=f"--task {text}" + (f": {key}" if key else ""),
            found=given.get(key),
            remedy=properties.get(key, {}).get("description"),
        ) from None
    return params


def _is_list(node: Mapping[str, Any]) -> bool:
    return node.get("type") == "array" or any(one.get("type") == "array" for one in node.get("anyOf", ()))
