"""Trainings that one process and two must agree on; run by torchrun as a module, it leaves the outcome in a folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from regraft.core.data.batches import Batches, BatchSettings
from regraft.core.data.examples import Example, ints
from regraft.core.errors import RegraftError
from regraft.core.processes import processes
from regraft.core.training.head import Head
from regraft.core.training.loop import Records
from regraft.core.training.objectives import CrossEntropy, Dpo
from regraft.core.training.weights import Trainable, select
from tests.core.training.support import fit, model_of, pairs, sequence, sequences

Q_PROJ, O_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight"
UP_PROJ, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@dataclass(frozen=True)
class Case:
    """A training of a tiny model.

    Args:
        family: and how it is saved, `options`.
        data: the examples.
        batch, settings: of batches and loop.
        dtype: of the model.
        trainable: what learns; None for all.
        objective: cross-entropy if None.
        penalty: of the model, or None.
        loss_tolerance, tolerance: of losses and relative gradient norms; and of weights.
    """

    family: str = "llama"
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Callable[[], list[Any]] = lambda: sequences(8)
    batch: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    trainable: Callable[[Any], dict[str, Trainable]] | None = None
    objective: Callable[[Any], Any] | None = None
    penalty: Callable[[Any], Any] | None = None
    loss_tolerance: float = 1e-5
    tolerance: float = 2e-5


def mixed(model):
    """Whole parameters, rows of one, and one outside of the model."""
    shift = torch.nn.Parameter(torch.zeros(64))
    model.model.layers[0].register_forward_hook(lambda module, given, output: output + shift)
    chosen = select(model, [UP_PROJ, NORM])
    return {**chosen, "rows": Trainable(model.get_parameter(Q_PROJ), (3, 9, 1)), "shift": Trainable(shift)}


def packed():
    rows = [sequence(12, number) for number in range(1, 9)]
    return [Example(row.ids, row.labels, row.place, ints([*range(5), *range(7)])) for row in rows]


def preference(model):
    head = Head.of(model)
    return Dpo(head, torch.zeros(8, 2))


CASES: dict[str, Case] = {
    "whole": Case(batch={"micro_batch": 1}, settings={"weight_decay": 0.1, "schedule": "cosine", "clip_norm": 0.5}),
    "odd vocabulary": Case(options={"vocab_size": 131}),
    "tied, average": Case("llama-tied", settings={"ema": 0.5}),
    "spam, checkpointing": Case(settings={"optimizer": "spam", "gradient_checkpointing": True}),
    "incomplete batch": Case(data=lambda: sequences(5), batch={"drop_last": False, "micro_batch": 1}),
    "mixed": Case(trainable=mixed),
    "slice alone": Case(trainable=lambda model: {"rows": Trainable(model.get_parameter(O_PROJ), (0, 5), 1)}),
    "head alone": Case(trainable=lambda model: select(model, ["lm_head.weight"])),
    "penalty": Case(
        trainable=lambda model: select(model, [NORM]), penalty=lambda model: 0.01 * model.model.norm.weight.abs().sum()
    ),
    "packed": Case(data=packed),
    "pairs": Case(data=lambda: pairs(8), objective=preference),
    "8 bit": Case(settings={"optimizer": "adamw-8bit"}, loss_tolerance=0.02, tolerance=1e-3),
    "masters": Case(dtype="bfloat16", settings={"eps": 1e-2}, loss_tolerance=0.02, tolerance=2e-3),
    "gemma2": Case("gemma2"),
    "gpt2": Case("gpt2", settings={"eps": 1e-4}),  # the gradient of a key's bias is nothing but rounding
    "mixtral": Case("mixtral"),
    "autocast": Case(settings={"precision": "bfloat16", "eps": 1e-2}, loss_tolerance=0.02, tolerance=1e-3),
}
Outcome = dict[str, Any]
"""`losses` and `norms` of the gradient, step by step, and `weights` by name."""


def train(case: Case, folder: Path, model: Any = None, **records: Any) -> Outcome:
    """Train, as one of the processes that there are."""
    model = model or model_of(folder, dtype=case.dtype)
    ours, norms = processes(), []
    settings = BatchSettings(**{"batch_size": 4, "epochs": 2, **case.batch})
    batches = Batches(case.data(), settings, 0, ours.rank, ours.world)
    listen = records.pop("listen", lambda progress: norms.append(progress.gradient_norm))
    report = fit(
        model,
        batches,
        objective=case.objective and case.objective(model),
        trainable=case.trainable and case.trainable(model),
        penalty=case.penalty and (lambda: case.penalty(model)),
        records=Records(listen=listen, **records),
        **{"save_every": 2, **case.settings},
    )
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return {"losses": list(report.losses), "norms": norms, "weights": weights}


RESUMED = ("whole", "8 bit", "tied, average", "mixed", "slice alone")


class Killed(BaseException):
    """What no handler catches."""


def resumed(case: Case, folder: Path, state: Path) -> Outcome:
    """Broken off after the third of four steps, and gone on from the second."""

    def kill(progress):
        if progress.step == 3:
            raise Killed

    try:
        train(case, folder, state=state, listen=kill)
    except Killed:
        return train(case, folder, state=state)
    raise AssertionError("it was not killed")


class NotFinite(CrossEntropy):
    """Of example 5."""

    def __call__(self, batch):
        loss, figures = super().__call__(batch)
        return loss * (torch.nan if 5 in batch.indices else 1.0), figures


def twice(folder: Path) -> tuple[list[str], Outcome]:
    """One model trained twice: between and after it is a plain one."""
    model = model_of(folder)
    train(CASES["whole"], folder, model)
    kinds = [type(module).__name__ for module in model.modules()]
    kinds += [name for module in model.modules() for name, value in vars(module).items() if "hooks" in name and value]
    outcome = train(CASES["whole"], folder, model)
    with torch.no_grad():
        model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2, do_sample=False)
    return kinds, outcome


def message(action: Callable[[], object]) -> str:
    """Of the error that it raises."""
    try:
        action()
    except RegraftError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def main(folders: Path, results: Path) -> None:
    """Everything that has a checkpoint in `folders`, in every process; results by rank."""
    ours, llama = processes(), folders / "whole"
    found: dict[str, Any] = {
        name: train(case, folders / name) for name, case in CASES.items() if (folders / name).exists()
    }
    for name in RESUMED:
        found[f"resumed: {name}"] = resumed(CASES[name], folders / name, results / f"state {name}")
    found["twice"] = twice(llama)
    bad = replace(CASES["whole"], objective=lambda model: NotFinite(Head.of(model)))
    found["not finite"] = message(lambda: train(bad, llama, state=results / "bad"))
    other = replace(CASES["whole"], settings={"lr": 1e-3 * (1 + ours.rank)})
    found["disagreement"] = message(lambda: train(other, llama))
    torch.save(found, results / f"{ours.rank}.pt")
    ours.part()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
