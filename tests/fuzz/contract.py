"""A parser held to its contract: bytes give a result, or one of `REFUSALS` with a message.

Nothing else is raised, nothing is written, and time and memory stay within bounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from regraft.core.errors import InputError, RegraftError, Unsupported, UsageError
from tests.fuzz.mutations import Pick

REFUSALS: tuple[type[RegraftError], ...] = (InputError, UsageError, Unsupported)
"""Exit codes 3, 2, and 1 for what is valid and not supported."""

Mutation = Callable[[bytes, Pick], bytes]


@dataclass(frozen=True)
class Target:
    """One parser.

    Args:
        name: of the format.
        read: parses bytes, as deeply as the product does before it computes anything.
        seeds: honest bytes.
        mutation: what suits the format.
    """

    name: str
    read: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    mutation: Mutation

    def survives(self, data: bytes) -> None:
        """Hold the parser to its contract."""
        try:
            self.read(data)
        except REFUSALS as error:
            if not error.message:
                raise
            str(error).encode("utf-8", "backslashreplace")  # as the command line prints it
            json.dumps(error.as_json(), default=str)


def target(mutation: Mutation, seeds: Callable[[], list[bytes]]) -> Callable[[Callable[[bytes], object]], Target]:
    """Make a function the target of its own name."""
    return lambda read: Target(read.__name__.replace("_", "-"), read, seeds, mutation)
