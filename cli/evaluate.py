"""`regraft eval`: what a checkpoint's model is worth on given data, alone or against a base."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regraft.cli.console import event, print_json, table, tell
from regraft.cli.options import Device, Dtype, Json, Model, Revision, TrustRemoteCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from regraft.core.evaluate.condition import Condition
    from regraft.core.evaluate.evaluate import Outcome


def _list(wanted: bool) -> None:
    if not wanted:
        return
    from regraft.core.evaluate.tasks import built_in_metrics
    from regraft.core.host import host

    kinds = {**host().metrics(), **{kind.name: kind for kind in built_in_metrics()}}
    for name, kind in kinds.items():
        print(f"{name}: {kind.summary}")
        for figure, meaning in kind.figures.items():
            print(f"  figure {figure}: {meaning}")
        for key, node in kind.Params.model_json_schema().get("properties", {}).items():
            print(f"  {key}=: {node.get('description', '')}")
    raise typer.Exit


def evaluate(
    checkpoint: Model,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help='NAME[:DATA] [key=value ...], such as "perplexity:a.txt window=512". '
                     "Give several. --list shows them."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="A base to compare with, on the same data.")
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help='Exit with 1 where it holds, such as "bpb > 1.02 * base".'),
    ] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plots into this folder.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of intervals and of what tasks draw.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a forward pass.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    list_tasks: Annotated[
        bool,
        typer.Option("--list", callback=_list, is_eager=True, help="Show what can be measured, and its parameters."),
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a checkpoint's model: perplexity, choices, passkey, preference, generation, forecasts, divergence."""
    del list_tasks
    from regraft.core.devices import check_device, resolve_device
    from regraft.core.errors import UsageError, VerificationError
    from regraft.core.evaluate.condition import read_condition
    from regraft.core.evaluate.evaluate import check_conditions, failed
    from regraft.core.evaluate.evaluate import evaluate as run
    from regraft.core.evaluate.metric import Measuring
    from regraft.core.evaluate.report import document, write_plots
    from regraft.core.evaluate.tasks import read_tasks
    from regraft.core.host import host
    from regraft.core.loaded import check_dtype, opened

    check_device(device)
    check_dtype(dtype)
    if not task:
        raise UsageError("no task is given", where="--task", remedy="name one, such as --task perplexity:held-out.txt")
    conditions = [read_condition(text) for text in fail_if or ()]
    plugins = host()
    tasks = read_tasks(task, plugins.metrics())
    check_conditions(conditions, tasks, against=against is not None)
    place = resolve_device(device)
    options: dict[str, Any] = {
        "device": place,
        "dtype": dtype,
        "trust_remote_code": trust_remote_code,
        "sources": plugins.sources(),
    }
    measuring = Measuring(seed, batch_size, tell=partial(_say, as_json=as_json))
    model = opened(checkpoint, revision=revision, **options)
    base = None if against is None else opened(against, **options)
    outcomes = run(tasks, model, base, measuring)
    found = failed(conditions, outcomes, against=against is not None)
    written = write_plots(plots, outcomes) if plots is not None else []
    if as_json:
        print_json(
            {
                "checkpoint": checkpoint,
                "against": against,
                "device": place,
                "seed": seed,
                "tasks": document(outcomes),
                "plots": [str(path) for path in written],
                "failed": [condition.text for condition in found],
            }
        )
    else:
        _print(outcomes, written, against=against)
    if found:
        raise VerificationError(_words(found), where="--fail-if", remedy="look at the table, or change the condition")


def _say(line: str, *, as_json: bool) -> None:
    if as_json:
        event("message", text=line)
    else:
        tell(line)


def _print(outcomes: Sequence[Outcome], written: Sequence[Path], *, against: str | None) -> None:
    from regraft.core.evaluate.report import rows_of

    print(table(rows_of(outcomes, against=against is not None)))
    for outcome in outcomes:
        for note in outcome.measured.notes:
            print(f"note: {outcome.task.id}: {note}")
    if written:
        print(f"wrote {len(written)} plots into {written[0].parent}")


def _words(found: Sequence[Condition]) -> str:
    return "; ".join(f"{condition.text} holds" for condition in found)
