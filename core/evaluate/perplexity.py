"""Perplexity and bits per byte: how surprising a model finds given text."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from regraft.core.errors import InputError, Unsupported
from regraft.core.evaluate.metric import Curve, Measured, Measuring, Metric
from regraft.core.evaluate.sample import Sample
from regraft.core.evaluate.texts import TextParams, Window, check_texts, read_texts, start_token, window_of, windows

if TYPE_CHECKING:
    from regraft.core.evaluate.texts import Text
    from regraft.core.loaded import Loaded

_BUCKETS = 8
"""Of the curve, for each doubling of the position."""


class Perplexity(Metric[TextParams]):
    """Cross-entropy of text, per token and per byte.

    Bits per byte do not depend on the tokenizer, so they compare models whose tokenizers differ; perplexity, which is
    per token, does not.
    """

    name = "perplexity"
    summary = "Perplexity and bits per byte of text files."
    figures = MappingProxyType(
        {
            "perplexity": "e to the mean cross-entropy of a token; lower is better",
            "bpb": "bits per byte of the text; lower is better",
        }
    )
    Params = TextParams

    def check(self, params: TextParams) -> None:
        """Whether the texts are there."""
        check_texts(params)

    def measure(self, subject: Loaded, params: TextParams, measuring: Measuring) -> Measured:
        """Read every text in windows, each token counted once."""
        texts, size = read_texts(params, subject.tokenizer), window_of(subject, params.window, measuring)
        start = start_token(subject.tokenizer)
        ledger = Ledger()
        for text in texts:
            measuring.tell(f"perplexity: {text.name}, {len(text.ids)} tokens")
            own = list(windows(text, size=size, stride=params.stride, start=start))
            for number in range(0, len(own), measuring.batch_size):
                some = own[number : number + measuring.batch_size]
                for window, losses in zip(some, token_losses(subject, some), strict=True):
                    ledger.add(text, window, losses)
        if not ledger.tokens:
            raise InputError(
                "no token of the data has another before it", where=", ".join(params.data), remedy="give longer texts"
            )
        return Measured(
            ledger.samples(),
            {"texts": len(texts), "tokens": ledger.tokens, "bytes": ledger.bytes, "window": size,
             "stride": params.stride},
            notes_on_windows(subject, size, params.window),
            {"loss by position": ledger.curve("loss (nats per token)")},
        )  # fmt: skip


def notes_on_windows(subject: Loaded, size: int, wish: int | None) -> list[str]:
    """What a reader should know of the window."""
    own = subject.window
    if wish is not None and own is not None and wish > own:
        return [f"{subject.checkpoint.label} is read in windows of {size} tokens, beyond its own of {own}"]
    return []


def token_losses(subject: Loaded, some: Sequence[Window]) -> list[list[float]]:
    """Cross-entropy in nats of the tokens of each window that count.

    Raises:
        Unsupported: the model has no positions for so many tokens.
        ResourceError: out of memory.
    """
    import torch

    from regraft.core.data.batches import collate
    from regraft.core.training.model import memory

    batch = collate([window.example for window in some], tuple(range(len(some))), subject.device)
    with torch.no_grad(), memory("measuring"), within_positions(subject, batch.input_ids.shape[1]):
        losses = subject.head.label_losses(batch, reduction="none").double().cpu()
    ends = [len(window.example) - 1 for window in some]
    return [
        losses[row, end - window.count : end].tolist() for row, (window, end) in enumerate(zip(some, ends, strict=True))
    ]


class within_positions:  # noqa: N801 - a context manager, called as a function
    """Turns what a model with a table of positions does beyond it into words."""

    def __init__(self, subject: Loaded, tokens: int) -> None:
        self.subject, self.tokens = subject, tokens

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """An index beyond a table of positions is what the user asked for."""
        window = self.subject.window
        if isinstance(error, IndexError) and window is not None and self.tokens > window:
            raise Unsupported(
                "the model has no positions beyond its window", where=self.subject.checkpoint.label,
                expected=f"at most {window} tokens", found=self.tokens, remedy="lower window",
            ) from None  # fmt: skip


@dataclass
class Ledger:
    """Losses by block and by position."""

    nats: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    sizes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    positions: dict[int, list[float]] = field(default_factory=dict)

    def add(self, text: Text, window: Window, losses: Sequence[float]) -> None:
        """The losses of a window's tokens that count."""
        for number, loss in enumerate(losses):
            token = window.first + number
            key = text.key(token)
            self.nats[key] += loss
            self.counts[key] += 1
            self.sizes[key] += text.sizes[token]
            bucket = math.floor(_BUCKETS * math.log2(len(window.example) - window.count + number + 1))
            total = self.positions.setdefault(bucket, [0.0, 0.0])
            total[0] += loss
            total[1] += 1

    @property
    def tokens(self) -> int:
        """All that counted."""
        return sum(self.counts.values())

    @property
    def bytes(self) -> int:
        """Of the tokens that counted."""
        return sum(self.sizes.values())

    def samples(self) -> dict[str, Sample]:
        """Perplexity and bits per byte, by block."""
        keys, nats = list(self.nats), list(self.nats.values())
        bits = [value / math.log(2) for value in nats]
        return {
            "perplexity": Sample(nats, [float(self.counts[key]) for key in keys], keys, "exp"),
            "bpb": Sample(bits, [float(self.sizes[key]) for key in keys], keys),
        }

    def curve(self, y: str) -> Curve:
        """The mean by position in the window, in steps that grow with it."""
        found = sorted(self.positions.items())
        xs = [2 ** (bucket / _BUCKETS) for bucket, _ in found]
        return Curve(xs, [total / count for _, (total, count) in found], "position in the window (tokens)", y, True)
