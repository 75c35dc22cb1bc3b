"""Conditions such as `bpb > 1.02 * base`: a small language of numbers, figures, arithmetic and comparisons.

    condition  = conjunction { "or" conjunction }
    conjunction = term { "and" term }
    term       = "(" condition ")" | comparison
    comparison = sum ("<" | "<=" | ">" | ">=" | "==" | "!=") sum
    sum        = product { ("+" | "-") product }
    product    = factor { ("*" | "/") factor }
    factor     = "-" factor | number | name | "(" sum ")"

Names are figures: `bpb`, `passkey.told`, `base.bpb`. A bare `base` is the base's value of the one figure that the
condition names. A comparison with NaN holds: what was not measured must not pass.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NoReturn

from regraft.core.errors import UsageError

BASE = "base"

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)"
    r"|(?P<name>[A-Za-z_][A-Za-z0-9_]*(?:[-.:/][A-Za-z0-9_]+)*)|(?P<sign><=|>=|==|!=|[-<>+*/()]))"
)
_COMPARE: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "==": operator.eq, "!=": operator.ne}
)
_LONGEST = 500
_WORDS = ("and", "or")

Values = Mapping[str, float]
Number = Callable[[Values], float]
Truth = Callable[[Values], bool]


@dataclass(frozen=True)
class Condition:
    """A condition that was read.

    Args:
        text: as the user wrote it.
        names: the figures in it, `base.` before those of the base.
        holds: whether it does, for the values of `names`.
    """

    text: str
    names: frozenset[str]
    holds: Truth


def read_condition(text: str) -> Condition:
    """Read a condition.

    A minus sign between two names needs a space before it, since names such as `lm-eval` have hyphens.

    Raises:
        UsageError: it is none.
    """
    reader = _Reader(text)
    try:
        holds = reader.condition()
    except RecursionError:
        reader.refuse("fewer brackets")
    if reader.kind != "end":
        reader.refuse("the end, and, or")
    names = _resolved(text, reader.names)
    own = [name for name in names if not name.startswith(f"{BASE}.")]
    bare = {BASE: f"{BASE}.{own[0]}"} if BASE in reader.names else {}

    def judged(values: Values) -> bool:
        return holds({**values, **{name: values[meant] for name, meant in bare.items()}})

    return Condition(text, frozenset(names), judged)


def _resolved(text: str, names: set[str]) -> set[str]:
    own = {name for name in names if name != BASE and not name.startswith(f"{BASE}.")}
    if not own:
        raise UsageError(
            "the condition names no figure", where="--fail-if", expected="such as bpb > 1.02 * base", found=text,
            remedy="name one",
        )  # fmt: skip
    if BASE not in names:
        return names
    if len(own) > 1:
        raise UsageError(
            "it is not clear whose base is meant", where="--fail-if", found=f"base, with {', '.join(sorted(own))}",
            remedy=f"write {', '.join(f'base.{name}' for name in sorted(own))}",
        )  # fmt: skip
    return (names - {BASE}) | {f"{BASE}.{next(iter(own))}"}


class _Reader:
    """Recursive descent over the tokens of a condition."""

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise UsageError(
                "the condition is too long", where="--fail-if", expected=f"at most {_LONGEST} characters",
                found=len(text), remedy="give several --fail-if",
            )  # fmt: skip
        self.text, self.end = text, 0
        self.names: set[str] = set()
        self.advance()

    def advance(self) -> None:
        """Go to the next token."""
        self.start = self.end
        if not self.text[self.start :].strip():
            self.kind, self.token = "end", "the end"
            return
        match = _TOKEN.match(self.text, self.start)
        if match is None:
            self.token = self.text[self.start :].strip()[0]
            self.refuse("a number, a figure or a sign")
        self.kind, self.token, self.end = str(match.lastgroup), match[str(match.lastgroup)], match.end()

    def refuse(self, expected: str) -> NoReturn:
        """Say where reading ended."""
        raise UsageError(
            "the condition cannot be read", where=f"--fail-if, at character {self.start + 1}", expected=expected,
            found=f"{self.token!r} in {self.text!r}", remedy='write it as in "bpb > 1.02 * base"',
        )  # fmt: skip

    def taken(self, *tokens: str) -> str:
        """The token, if it is one of these, and on to the next; else nothing."""
        if self.kind not in ("sign", "name") or self.token not in tokens:
            return ""
        token = self.token
        self.advance()
        return token

    def condition(self) -> Truth:
        parts = [self.conjunction()]
        while self.taken("or"):
            parts.append(self.conjunction())
        return lambda values: any(part(values) for part in parts)

    def conjunction(self) -> Truth:
        parts = [self.term()]
        while self.taken("and"):
            parts.append(self.term())
        return lambda values: all(part(values) for part in parts)

    def term(self) -> Truth:
        before = self.start, self.end, self.kind, self.token
        if self.taken("("):
            try:
                part = self.condition()
            except UsageError:  # a bracket around a sum, not around a condition
                self.start, self.end, self.kind, self.token = before
                return self.comparison()
            if not self.taken(")"):
                self.refuse(")")
            return part
        return self.comparison()

    def comparison(self) -> Truth:
        left = self.sum()
        sign = self.taken(*_COMPARE)
        if not sign:
            self.refuse("a comparison such as > or <=")
        right, holds = self.sum(), _COMPARE[sign]

        def compared(values: Values) -> bool:
            one, other = left(values), right(values)
            return math.isnan(one) or math.isnan(other) or holds(one, other)

        return compared

    def sum(self) -> Number:
        value = self.product()
        while sign := self.taken("+", "-"):
            value = _joined(value, self.product(), operator.add if sign == "+" else operator.sub)
        return value

    def product(self) -> Number:
        value = self.factor()
        while sign := self.taken("*", "/"):
            value = _joined(value, self.factor(), operator.mul if sign == "*" else _divide)
        return value

    def factor(self) -> Number:
        if self.taken("-"):
            inner = self.factor()
            return lambda values: -inner(values)
        if self.taken("("):
            inner = self.sum()
            if not self.taken(")"):
                self.refuse(")")
            return inner
        kind, token = self.kind, self.token
        if kind not in ("number", "name") or token in _WORDS:
            self.refuse("a number or a figure")
        self.advance()
        if kind == "number":
            number = float(token)
            return lambda values: number
        self.names.add(token)
        return lambda values: values[token]


def _joined(one: Number, other: Number, join: Callable[[float, float], float]) -> Number:
    return lambda values: join(one(values), other(values))


def _divide(one: float, other: float) -> float:
    return one / other if other else math.nan
