"""Frozen layers that run once for every sequence, instead of once for every step.

Where nothing below layer l0 learns, the states that enter it are the same in every epoch. They are computed once and
kept; a step then runs layers l0 to L - 1 alone. Of a step whose backward pass costs what its forward pass does, that is

    (2L - l0) / (2(L - l0))

times as fast, since autograd stops at l0 anyway. Position embeddings and masks are made by the model as ever: the
layers below are still called, but hand on what they are given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from regraft.core.data.batches import Batch, Batches
from regraft.core.data.examples import Example, PreferenceExample
from regraft.core.errors import ResourceError, Unsupported
from regraft.core.training.head import Head
from regraft.core.training.last_mlp import learnt_tokens_only
from regraft.core.training.model import memory
from regraft.core.training.modes import computing, reproducible, without_dropout

_TOLERANCE, _LOW_TOLERANCE = 1e-4, 3e-2
"""Relative, for fp32 and for less: rounding is far below; a layer that reads something else than states, far above."""


def predicted_speed_up(num_layers: int, first: int) -> float:
    """How much faster a step is with `first` of `num_layers` layers cached, by the number of layers alone."""
    return (2 * num_layers - first) / (2 * (num_layers - first))


@dataclass(frozen=True)
class PrefixHead(Head):
    """The losses of a model whose lower layers are cached; of the cache's own sequences only."""

    cache: PrefixCache | None = None

    def label_losses(self, batch: Batch, *, reduction: str = "sum") -> torch.Tensor:
        """As `Head.label_losses`, from the cached states."""
        assert self.cache is not None
        if batch.position_ids is not None:
            _ = self.reads_apart  # runs the model, which it must do whole
        with self.cache.serving(batch), self._learnt_only(batch):
            return super().label_losses(batch, reduction=reduction)

    def _learnt_only(self, batch: Batch) -> AbstractContextManager[None]:
        """Not with gradient checkpointing, which runs the layer again in the backward pass."""
        module = self.cache.last_mlp if self.cache is not None else None
        if module is None or self.model.is_activation_checkpointing:
            return nullcontext()
        return learnt_tokens_only(module, batch.labels)


class PrefixCache:
    """The states that enter layer `first`, for every sequence of `batches`. Legend: d hidden size.

    Args:
        head: of the model.
        layers: all of its decoder layers.
        first: the lowest layer that is run; at least 1.
        batches: its sequences, or pairs, are cached.
        precision: in which the training computes.
        max_bytes: of the states, which are on the CPU (pinned for CUDA): tokens · d · bytes of a number.
        last_mlp: module of the last layer's MLP, to be computed for learnt tokens alone; None computes it for all.

    Raises:
        Unsupported: a layer gives more than states, or the model computes something else without its lower layers.
        ResourceError: the states are larger than `max_bytes`, or than the memory.
    """

    def __init__(
        self,
        head: Head,
        layers: Sequence[Any],
        first: int,
        batches: Batches,
        *,
        precision: str = "float32",
        max_bytes: int | None = None,
        last_mlp: Any | None = None,
    ) -> None:
        assert 0 < first < len(layers)
        self.model, self.below = head.model, list(layers[:first])
        self.batches, self.precision, self.max_bytes, self.last_mlp = batches, precision, max_bytes, last_mlp
        self.device = next(head.model.parameters()).device
        self.head = PrefixHead(head.model, head.module, head.softcap, head.fused, self)
        self.whole = head
        self.starts = _starts(batches.examples)
        self.states = torch.empty(0)
        self.rest: list[tuple[Any, ...] | None] = []
        doing = "caching the states of the frozen layers"
        with reproducible(self.device), torch.no_grad(), without_dropout(self.model), memory(doing):
            self._fill()
            self._check()

    @property
    def tokens(self) -> int:
        """Tokens whose states are kept."""
        return self.starts[-1]

    @property
    def nbytes(self) -> int:
        """Size of the states."""
        return self.states.nbytes

    @contextmanager
    def serving(self, batch: Batch) -> Iterator[None]:
        """While this lasts the model runs on `batch` from the cached states."""
        states = self._gathered(batch)
        last = len(self.below) - 1
        with ExitStack() as stack:
            for number, layer in enumerate(self.below):
                rest = self.rest[number]
                layer.forward = _giving(states, rest) if number == last else _handing_on(rest)
                stack.callback(delattr, layer, "forward")
            yield

    def _fill(self) -> None:
        size = self.batches.settings.micro_batch or self.batches.settings.batch_size
        order = sorted(range(len(self.batches.examples)), key=lambda index: len(self.batches.examples[index]))
        for start in range(0, len(order), size):
            batch = self.batches.gather(order[start : start + size], str(self.device))
            states = self._entering(batch)
            if not self.states.numel():
                self._allocate(states)
            for row, (begin, length) in enumerate(self._places(batch)):
                self.states[begin : begin + length].copy_(states[row, :length])

    def _allocate(self, states: torch.Tensor) -> None:
        width = states.shape[-1]
        nbytes = self.tokens * width * states.element_size()
        if self.max_bytes is not None and nbytes > self.max_bytes:
            raise ResourceError(
                "the states of the frozen layers are larger than they may be",
                where="prefix cache",
                expected=f"at most {self.max_bytes} bytes",
                found=f"{nbytes} bytes ({self.tokens} tokens of {width} numbers)",
                remedy="allow more, give fewer or shorter sequences, or switch the prefix cache off",
            )
        try:
            pinned = self.device.type == "cuda"
            self.states = torch.empty(self.tokens, width, dtype=states.dtype, pin_memory=pinned)
        except RuntimeError as error:
            raise ResourceError(
                "not enough memory for the states of the frozen layers",
                where="prefix cache",
                expected=f"{nbytes} bytes",
                found=str(error).splitlines()[0],
                remedy="switch the prefix cache off",
            ) from None

    def _entering(self, batch: Batch) -> torch.Tensor:
        """The states [rows, T, d] behind the last layer below; the layers above are not run."""
        outputs: list[Any] = []

        def keep(module: Any, args: Any, output: Any) -> None:
            outputs.append(output)
            if len(outputs) == len(self.below):
                raise _Enough

        with ExitStack() as stack:
            for layer in self.below:
                stack.callback(layer.register_forward_hook(keep).remove)
            try:
                with computing(self.device.type, self.precision):
                    self.whole.hidden(batch.input_ids, batch.position_ids)
            except _Enough:
                pass
        if len(outputs) != len(self.below):
            raise _unfit("the lower layers do not run one after the other")
        self.rest = [_rest(output) for output in outputs]
        states: torch.Tensor = outputs[-1] if isinstance(outputs[-1], torch.Tensor) else outputs[-1][0]
        if states.shape[:2] != batch.input_ids.shape:
            raise _unfit(f"the states of a layer have the shape {list(states.shape)}")
        return states

    def _check(self) -> None:
        """Try the cache on one batch, instead of trusting the class."""
        size = self.batches.settings.micro_batch or self.batches.settings.batch_size
        batch = self.batches.gather(range(min(size, len(self.batches.examples))), str(self.device))
        training = self.model.training
        self.model.train()
        try:
            with computing(self.device.type, self.precision):
                whole = self.whole.label_losses(batch, reduction="none").double()
                ours = self.head.label_losses(batch, reduction="none").double()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise _unfit(f"the layers above do not run alone: {str(error).splitlines()[0]}") from None
        finally:
            self.model.train(training)
        low = self.precision != "float32" or self.states.dtype != torch.float32
        off = ((ours - whole).norm() / whole.norm()).item()
        if not off <= (_LOW_TOLERANCE if low else _TOLERANCE):
            raise _unfit(f"the layers above read more than the states: losses differ by {off:.1e} of their size")

    def _gathered(self, batch: Batch) -> torch.Tensor:
        """The states of the batch's rows, [rows, T, d] on the device; zeros behind a sequence, where nothing looks."""
        rows, longest = batch.input_ids.shape
        states = self.states.new_zeros(rows, longest, self.states.shape[-1], device=self.device)
        for row, (begin, length) in enumerate(self._places(batch)):
            states[row, :length].copy_(self.states[begin : begin + length], non_blocking=True)
        return states

    def _places(self, batch: Batch) -> list[tuple[int, int]]:
        """Start and length of each row of the batch in the states: chosen answers, then rejected ones."""
        per_example = 2 if self.batches.pairs else 1
        numbers = [index * per_example + one for one in range(per_example) for index in batch.indices]
        return [(self.starts[number], self.starts[number + 1] - self.starts[number]) for number in numbers]


class _Enough(Exception):
    pass


def _unfit(reason: str) -> Unsupported:
    return Unsupported(
        "the lower layers of this model cannot be cached",
        where="prefix cache",
        found=reason,
        remedy="switch the prefix cache off",
    )


def _starts(examples: Sequence[Example | PreferenceExample]) -> list[int]:
    """Where each sequence begins among the tokens of all, and the end; a pair's answers stand side by side."""
    starts = [0]
    for example in examples:
        for one in (example,) if isinstance(example, Example) else (example.chosen, example.rejected):
            starts.append(starts[-1] + len(one))
    return starts


def _rest(output: Any) -> tuple[Any, ...] | None:
    """What a layer gives beside its states; None where it gives the states alone."""
    if isinstance(output, torch.Tensor):
        return None
    if not isinstance(output, tuple) or not output or not isinstance(output[0], torch.Tensor):
        raise _unfit(f"a layer gives {type(output).__name__}")
    if any(one is not None for one in output[1:]):
        raise _unfit("a layer gives more than its states")
    return output[1:]


def _giving(states: torch.Tensor, rest: tuple[Any, ...] | None) -> Any:
    given = states if rest is None else (states, *rest)
    return lambda *args, **options: given


def _handing_on(rest: tuple[Any, ...] | None) -> Any:
    def forward(*args: Any, **options: Any) -> Any:
        states = args[0] if args else options["hidden_states"]
        return states if rest is None else (states, *rest)

    return forward
