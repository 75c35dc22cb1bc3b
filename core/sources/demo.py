"""`demo:tiny`: the small trained checkpoint that ships in the wheel."""

from __future__ import annotations

from dataclasses import replace

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import InputError
from regraft.core.sources.folder import open_folder
from regraft.core.sources.open import Reference


class DemoSource:
    """Accepts `demo:NAME`."""

    name = "demo"

    def accepts(self, reference: Reference) -> bool:
        """Whether the model begins with `demo:`."""
        return reference.model.startswith("demo:")

    def open(self, reference: Reference) -> Checkpoint:
        """Open the embedded checkpoint.

        Raises:
            InputError: there is no demo of that name.
        """
        from regraft.core.demo import TINY

        if reference.model != "demo:tiny":
            raise InputError("there is no such demo checkpoint", where=reference.model, expected="demo:tiny")
        return replace(open_folder(TINY, label="demo:tiny"), origin={"source": self.name})
