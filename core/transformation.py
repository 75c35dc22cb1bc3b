"""The contract of a transformation, and what a step is handed while it runs."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from regraft.core.checkpoint import Checkpoint
from regraft.core.patch import Outline, Patch


class Params(BaseModel):
    """Base of every transformation's parameters: a pydantic model that refuses unknown keys and cannot be changed.

    A field of type `Path` is resolved against the folder of the recipe that wrote it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)


P = TypeVar("P", bound=BaseModel)


def _silent(message: str) -> None:
    del message


@dataclass(frozen=True)
class Run:
    """What a step is handed while it executes.

    Args:
        step: the step's id.
        device: torch device string, such as `cpu` or `cuda:0`.
        seed: the recipe's seed; see `seed_for`.
        strict: refuse what is otherwise warned about.
        cache: a folder for the step's own intermediate files, gone when the run ends; all processes have the same.
        tell: shows a line of progress to the user; under torchrun, that of the first process.
        trust: whether Python code of the checkpoint may run: the recipe says so, or it comes from our own steps.
        state: where the step may keep what lets it go on after the run was killed, interrupted or failed. It makes the
            folder itself; only the first process writes it. It is gone when the target stands.
        rank, world: this process and how many there are, under torchrun.
    """

    step: str
    device: str = "cpu"
    seed: int = 0
    strict: bool = False
    cache: Path | None = None
    tell: Callable[[str], None] = field(default=_silent, compare=False)
    trust: bool = False
    state: Path | None = None
    rank: int = 0
    world: int = 1

    def seed_for(self, name: str) -> int:
        """A 63-bit seed from the recipe's seed, the step and `name`: independent of order and of threads."""
        text = f"{self.seed}\0{self.step}\0{name}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1

    def model(self, checkpoint: Checkpoint, **options: Any) -> Any:
        """The stock transformers model of `checkpoint` on this run's device; see `training.model.materialise_model`."""
        from regraft.core.training.model import materialise_model

        return materialise_model(checkpoint, self.device, **{"trust_remote_code": self.trust, **options})

    def tokenizer(self, checkpoint: Checkpoint, **options: Any) -> Any:
        """The tokenizer of `checkpoint`; see `training.model.materialise_tokenizer`."""
        from regraft.core.training.model import materialise_tokenizer

        return materialise_tokenizer(checkpoint, **{"trust_remote_code": self.trust, **options})


class Transformation(ABC, Generic[P]):
    """One method of rewriting a checkpoint; a recipe uses it by `name`.

    `check` and `plan` see headers and parameters only and import neither torch nor transformers.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    loads_with: ClassVar[str] = "stock transformers"
    """What a user needs to load the result."""
    version: ClassVar[str] = "1"
    """Changes whenever the same parameters give other bytes; part of the lock file."""
    own_code: ClassVar[bool] = True
    """Whether Python that it writes into a checkpoint comes from its own templates, so that verification may run it."""
    Params: type[P]

    @classmethod
    def example(cls, checkpoint: Checkpoint, folder: Path) -> Mapping[str, Any]:
        """Parameters, as a recipe writes them, with which `regraft plugins check` tries it on a tiny checkpoint.

        Args:
            checkpoint: the tiny base that they are for.
            folder: where to write files that they name, such as an adapter or rows of data.

        Raises:
            NotApplicable: (of `regraft.testing`) a package that the transformation needs is not installed.
        """
        del checkpoint, folder
        return {}

    def check(self, checkpoint: Checkpoint, params: P) -> None:
        """Refuse what cannot be done.

        Raises:
            Unsupported: with the reason and the remedy.
        """

    @abstractmethod
    def plan(self, checkpoint: Checkpoint, params: P) -> Outline:
        """What `apply` will change: specs, config, files, cost."""

    @abstractmethod
    def apply(self, checkpoint: Checkpoint, params: P, run: Run) -> Patch:
        """The patch. It must match the outline of `plan`; the executor checks it."""


class WeightSpace(Transformation[P]):
    """A transformation that is a pure function of tensors and config: one lazy patch serves both plan and run."""

    @abstractmethod
    def patch(self, checkpoint: Checkpoint, params: P) -> Patch:
        """The patch, made from headers and parameters only: operations load their operands when tensors are written."""

    def plan(self, checkpoint: Checkpoint, params: P) -> Outline:
        """The outline of the patch."""
        return Outline.of(self.patch(checkpoint, params))

    def apply(self, checkpoint: Checkpoint, params: P, run: Run) -> Patch:
        """The patch itself."""
        del run
        return self.patch(checkpoint, params)


AnyTransformation = Transformation[Any]


def fault_of(kind: object) -> str:
    """Why `kind` is not a class that recipes can use; empty if it is."""
    if not isinstance(kind, type) or not issubclass(kind, Transformation):
        return "is not a subclass of Transformation"
    missing = [name for name in ("name", "summary", "Params") if not hasattr(kind, name)]
    if missing:
        return f"has no {', '.join(missing)}"
    if not isinstance(kind.name, str) or not issubclass(kind.Params, BaseModel):
        return "needs a name that is a string, and Params that are a pydantic model"
    if abstract := sorted(kind.__abstractmethods__):
        return f"does not define {', '.join(abstract)}"
    return ""
