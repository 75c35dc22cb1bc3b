"""Fenced blocks of a Markdown page: the files it shows, and the commands with what they print."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
_VARIES = re.compile(r"\d+(?:\.\d+)? (?:s\b|of memory)|at most \d+(?:\.\d+)? [MG]B of memory|\d+ tokens/s|00:\d\d:\d\d")
_TOLERANCE = 0.1


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its title (a file name) if it has one, and its text."""

    language: str
    title: str | None
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a console block and the lines that it should print; `...` stands for any lines."""

    command: str
    expected: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    return [Block(*match.groups()) for match in _FENCE.finditer(page.read_text(encoding="utf-8"))]


def commands(block: Block) -> list[Command]:
    """The commands of a console block: lines after `$ `, continued by a backslash."""
    found: list[tuple[str, list[str]]] = []
    open_ = False
    for line in block.text.splitlines():
        if open_:
            found[-1] = (f"{found[-1][0]}\n{line}", [])
        elif line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"a console block begins with output: {line}"
            found[-1][1].append(line)
            continue
        open_ = line.endswith("\\")
    return [Command(command, tuple(lines)) for command, lines in found]


def difference(expected: tuple[str, ...], printed: list[str]) -> str | None:
    """Where what was printed is not what the page says, or None."""
    if not expected:
        return None
    rest = list(printed)
    skipping = False
    for line in expected:
        if line.strip() == "...":
            skipping = True
            continue
        while skipping and rest and not same(line, rest[0]):
            rest.pop(0)
        if not rest or not same(line, rest[0]):
            return f"the page says\n  {line}\nand the command\n  {rest[0] if rest else 'nothing more'}"
        rest.pop(0)
        skipping = False
    return None if skipping or not rest else f"the command says more:\n  {rest[0]}"


def same(page: str, printed: str) -> bool:
    """Whether two lines have the same words, and numbers that differ by a tenth at most; times and memory do not count.

    Whole numbers of at least three digits, such as sizes, are to be equal.
    """
    page, printed = (" ".join(_VARIES.sub("#", line).split()) for line in (page, printed))
    if _NUMBER.sub("#", page) != _NUMBER.sub("#", printed):
        return False
    pairs = zip(_NUMBER.findall(page), _NUMBER.findall(printed), strict=True)
    return all(_close(first, second) for first, second in pairs)


def _close(first: str, second: str) -> bool:
    if first.lstrip("+-").isdigit() and len(first) >= 3:
        return first == second
    return abs(float(first) - float(second)) <= max(_TOLERANCE * abs(float(first)), 0.06)
