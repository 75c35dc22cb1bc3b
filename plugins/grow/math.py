"""How axes grow: old places kept, new ones filled, copied or split. Pure functions of sizes."""

from __future__ import annotations

from collections.abc import Iterator

from regraft.core.shape_operations import Span, Spans


def kept(size: int, scale: float = 1.0) -> Spans:
    """All places as they are, times `scale`."""
    return (Span(size, 0, scale),)


def filled(old: int, new: int, scale: float = 1.0) -> Spans:
    """The old places times `scale`, then filled ones."""
    return (Span(old, 0, scale), Span(new - old))


def copied(old: int, new: int, scale: float = 1.0) -> Spans:
    """The old places times `scale`, over and over until there are `new`."""
    return tuple(Span(min(old, new - start), 0, scale) for start in range(0, new, old))


def split(old: int, new: int) -> Spans:
    """`old` to `new` <= 2 `old` places: the first `new` - `old` as two halves each, the rest as they are."""
    more = new - old
    rest = (Span(old - more, more),) if old > more else ()
    return (Span(more, 0, half="first"), *rest, Span(more, 0, half="second"))


def joined(parts: Iterator[tuple[int, Spans]]) -> Spans:
    """Spans of an axis on which roles of the given old sizes stand one after another."""
    spans: list[Span] = []
    start = 0
    for size, own in parts:
        spans += [span.moved(start) for span in own]
        start += size
    return tuple(spans)


def changes(spans: Spans) -> bool:
    """Whether they are anything but the whole axis as it is."""
    start = 0
    for span in spans:
        if span.start != start or span.scale != 1.0 or span.half:
            return True
        start = span.stop
    return False
