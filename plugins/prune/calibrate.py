"""How large the inputs of projections are on data: one pass through the model, memory for a number per input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from regraft.core.architectures import Architecture
from regraft.core.checkpoint import Checkpoint
from regraft.core.data.batches import collate
from regraft.core.data.examples import Example
from regraft.core.data.load import Dataset, load_data
from regraft.core.errors import InputError, UsageError
from regraft.core.training.head import Head
from regraft.core.training.model import memory, window_of
from regraft.core.training.modes import reproducible, without_dropout
from regraft.core.training.modules import role_module
from regraft.core.training.suitable import refuse_untrusted_code
from regraft.core.transformation import Run
from regraft.plugins.prune.params import PruneParams
from regraft.plugins.prune.places import Matrix

Norms = Mapping[str, torch.Tensor]
"""By tensor, the root mean square of each of its inputs: [inputs] in fp32."""


@dataclass
class MeanSquare:
    """The mean of x² over rows of x, as they come.

    Args:
        mean: [inputs], float64.
        count: rows so far.
    """

    mean: torch.Tensor
    count: int = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in rows [n, inputs]: mean += (their mean - mean) n / (count + n)."""
        self.count += len(rows)
        own = rows.double().square().sum(0) / self.count
        self.mean = self.mean * (1 - len(rows) / self.count) + own


@dataclass
class Watch:
    """Listens to the inputs of modules.

    Args:
        squares: by tensor.
        valid: [B · T] bool, tokens of the batch that are no padding.
    """

    squares: dict[str, MeanSquare] = field(default_factory=dict)
    valid: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def hook(self, tensor: str, inputs: int) -> Callable[..., None]:
        """A forward pre-hook for the module of `tensor`, which has so many inputs."""

        def before(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = arguments[0].detach().reshape(-1, inputs)[self.valid]
            found = self.squares.setdefault(
                tensor, MeanSquare(torch.zeros(inputs, dtype=torch.float64, device=rows.device))
            )
            found.add(rows)

        return before

    def norms(self) -> dict[str, torch.Tensor]:
        """sqrt(E x²), on the CPU.

        Raises:
            InputError: an activation was not finite.
        """
        for tensor, found in self.squares.items():
            if bad := int((~found.mean.isfinite()).sum()):
                raise InputError("an input of a projection is not finite", where=tensor, expected="numbers",
                                 found=f"NaN or Inf in {bad} of {len(found.mean)} inputs",
                                 remedy='check the weights with --strict, or compute in dtype = "float32"')  # fmt: skip
        return {tensor: found.mean.sqrt().float().cpu() for tensor, found in self.squares.items()}


@dataclass(frozen=True)
class Calibration:
    """What the data gave.

    Args:
        norms: by task.
        data: the sequences of each task.
    """

    norms: Mapping[str, Norms]
    data: Mapping[str, Dataset]


def calibrate(
    checkpoint: Checkpoint, architecture: Architecture, matrices: Sequence[Matrix], params: PruneParams, run: Run
) -> Calibration:
    """Measure the inputs of `matrices` on every task.

    Raises:
        InputError, UsageError, Unsupported, ResourceError: as model and data are read, and the model runs.
    """
    refuse_untrusted_code(checkpoint, trust=run.trust)
    tokenizer, model = run.tokenizer(checkpoint), run.model(checkpoint, dtype=params.dtype)
    window, norms, data = window_of(checkpoint, model), {}, {}
    for task, settings in params.measured.items():
        data[task] = load_data(settings, tokenizer, window=window, seed=run.seed_for(task))
        texts = _texts(data[task], task)
        tell = _telling(run, task, len(texts))
        norms[task] = measure(model, architecture, matrices, texts, params.batch_size, tell)
    return Calibration(norms, data)


def _telling(run: Run, task: str, total: int) -> Callable[[int], None]:
    return lambda done: run.tell(f"inputs on {task}: {done}/{total} sequences")


def _texts(dataset: Dataset, task: str) -> list[Example]:
    texts = [one for one in dataset.examples if isinstance(one, Example)]
    if len(texts) != len(dataset.examples):
        raise UsageError(
            "a preference pair is not one text",
            where=task,
            expected="texts, completions or chats",
            found="preference pairs",
            remedy='kind = "completion", columns = { completion = "chosen" }',
        )
    return texts


def measure(
    model: Any,
    architecture: Architecture,
    matrices: Sequence[Matrix],
    examples: Sequence[Example],
    batch_size: int = 8,
    tell: Callable[[int], object] = lambda done: None,
) -> Norms:
    """sqrt(E x_j²) over the tokens of `examples`, of every input j of the tensors that hold `matrices`.

    Args:
        model: a causal language model of transformers, in eval mode.
        architecture: its roles.
        matrices: of which the inputs are measured.
        examples: at least one sequence.
        batch_size: sequences that run together, padded on the right, where causal attention does not look.
        tell: is called with the number of sequences done.

    Raises:
        Unsupported: the model has no such module.
        InputError: an input is not finite.
        ResourceError: out of memory.
    """
    head, watch = Head.of(model, fused=False), Watch()
    device = next(model.parameters()).device
    modules = {
        matrix.slot.tensor: (role_module(model, architecture, matrix.role, matrix.layer), matrix.shape[1])
        for matrix in matrices
    }
    with (
        torch.no_grad(),
        without_dropout(model),
        reproducible(device),
        memory("measuring inputs"),
        ExitStack() as stack,
    ):
        for tensor, (module, inputs) in modules.items():
            stack.callback(module.register_forward_pre_hook(watch.hook(tensor, inputs)).remove)
        for start in range(0, len(examples), batch_size):
            sequences = examples[start : start + batch_size]
            batch = collate(sequences, tuple(range(len(sequences))), str(device))
            lengths = torch.tensor([len(one) for one in sequences], device=device)
            watch.valid = (torch.arange(batch.input_ids.shape[1], device=device) < lengths[:, None]).flatten()
            head.hidden(batch.input_ids, batch.position_ids)
            tell(start + len(sequences))
    return watch.norms()
