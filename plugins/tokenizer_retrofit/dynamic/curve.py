"""How much shorter a corpus gets with the number of merges, measured by the runtime itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from regraft.core.errors import InputError
from regraft.plugins.tokenizer_retrofit.passages import passages
from regraft.plugins.tokenizer_retrofit.portable.cutting import Merger, parts_of
from regraft.plugins.tokenizer_retrofit.portable.merging import merge_words
from regraft.plugins.tokenizer_retrofit.tokenizer_file import TokenizerFile

BATCHES = 8
"""Batches that are measured; single texts: as many as fill these."""


@dataclass(frozen=True)
class Curve:
    """Tokens left after each number of merges, over all batches.

    Args:
        before: the tokenizer's tokens.
        saved: tokens saved by 0, 1, 2, ... merges for each batch, or text, until nothing can be merged.
    """

    before: int
    saved: tuple[int, ...]

    def reduction(self, merges: int) -> float:
        """Of the way to merging all that can be merged; 0 where nothing can be."""
        return self.saved[min(merges, len(self.saved) - 1)] / max(1, self.saved[-1])

    def shorter(self, merges: int) -> float:
        """The share of tokens that is saved."""
        return self.saved[min(merges, len(self.saved) - 1)] / self.before

    def table(self) -> list[list[float]]:
        """For each percent of reduction the fewest merges that reach it, the reduction, and the share saved."""
        rows: list[list[float]] = []
        for merges in range(len(self.saved)):
            reached = int(self.reduction(merges) * 100 + 1e-9)
            if not rows or reached > int(rows[-1][1] * 100 + 1e-9):
                rows.append([merges, round(self.reduction(merges), 6), round(self.shorter(merges), 6)])
        return rows

    def merges_for(self, reduction: float) -> int:
        """The fewest merges that reach a reduction.

        Raises:
            InputError: nothing in the corpus can be merged.
        """
        if not self.saved[-1]:
            raise InputError("the corpus has nothing to merge", where="corpus", remedy="give more text, or set merges")
        return next(merges for merges in range(len(self.saved)) if self.reduction(merges) >= reduction - 1e-9)


def measure(
    old: TokenizerFile, policy: Mapping[str, Any], texts: Iterable[str], *, batch_size: int, seed: int
) -> Curve:
    """Merge batches of passages of the corpus until nothing is left to merge.

    Args:
        old: the tokenizer.
        policy: its boundary, scope, counts and lengths.
        texts: the corpus.
        batch_size: passages of a batch.
        seed: of the draw of passages.

    Raises:
        InputError: the corpus is empty.
    """
    merger = Merger(old.backend(), policy)
    before = 0
    steps: list[int] = []
    sample = drawn(texts, batch_size * BATCHES, seed)
    for start in range(0, len(sample), batch_size):
        cut = merger.cut(sample[start : start + batch_size], special=False)
        before += sum(map(len, cut))
        for group in [cut] if policy["scope"] == "batch" else [[text] for text in cut]:
            words = merger.words(map(parts_of, group))
            _, saved = merge_words(words, None, min_count=policy["min_count"], valid=merger.valid)
            steps += [0] * (len(saved) - len(steps))
            for place, tokens in enumerate(saved):
                steps[place] += tokens
    if not before:
        raise InputError("the corpus has no text", where="corpus", remedy="give more data")
    total = [0]
    for tokens in steps:
        total.append(total[-1] + tokens)
    return Curve(before, tuple(total))


def plot(curve: Curve, policy: Mapping[str, Any]) -> bytes:
    """PNG of both shares against the number of merges."""
    from regraft.core.plots import line_chart

    merges = range(len(curve.saved))
    series = {
        "reduction, of what can be merged": (merges, [100 * curve.reduction(count) for count in merges]),
        "tokens saved": (merges, [100 * curve.shorter(count) for count in merges]),
    }
    title = f"Dynamic tokenization: merges for each {'batch' if policy['scope'] == 'batch' else 'text'}"
    return line_chart(series, title=title, x="merges", y="per cent")


def drawn(texts: Iterable[str], count: int, seed: int) -> list[str]:
    """Passages drawn from all of the corpus, in its order; blank ones are left out."""
    draw = Random(seed)
    kept: list[tuple[int, str]] = []
    whole = (passage for text in texts for passage in passages([text]) if passage.strip())
    for place, passage in enumerate(whole):
        if place < count:
            kept.append((place, passage))
        elif (slot := draw.randrange(place + 1)) < count:
            kept[slot] = (place, passage)
    return [passage for _, passage in sorted(kept)]
