"""Tests of plugins: tiny checkpoints and data, a step or a recipe in one call, and the conformance suite.

Part of the versioned API. Names are loaded on first use: `import regraft.testing` imports neither torch nor
transformers, and pytest not at all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regraft.core.testing.adapters import write_adapter
    from regraft.core.testing.checkpoints import bits, read_tensors, same_bits, tree, write_checkpoint
    from regraft.core.testing.conformance.check import Check, NotApplicable, Outcome
    from regraft.core.testing.conformance.for_pytest import Conformance
    from regraft.core.testing.conformance.subject import Subject
    from regraft.core.testing.conformance.suite import CHECKS, conform
    from regraft.core.testing.data import completions, preferences, texts, write_rows
    from regraft.core.testing.models import FAMILIES, VARIANTS, save_tiny, save_tokenizer, tiny
    from regraft.core.testing.running import StepResult, apply_recipe, host_of, run_step

_HOMES = {
    "regraft.core.testing.adapters": ("write_adapter",),
    "regraft.core.testing.checkpoints": ("bits", "read_tensors", "same_bits", "tree", "write_checkpoint"),
    "regraft.core.testing.conformance.check": ("Check", "NotApplicable", "Outcome"),
    "regraft.core.testing.conformance.for_pytest": ("Conformance",),
    "regraft.core.testing.conformance.subject": ("Subject",),
    "regraft.core.testing.conformance.suite": ("CHECKS", "conform"),
    "regraft.core.testing.data": ("completions", "preferences", "texts", "write_rows"),
    "regraft.core.testing.models": ("FAMILIES", "VARIANTS", "save_tiny", "save_tokenizer", "tiny"),
    "regraft.core.testing.running": ("StepResult", "apply_recipe", "host_of", "run_step"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CHECKS",
    "FAMILIES",
    "VARIANTS",
    "Check",
    "Conformance",
    "NotApplicable",
    "Outcome",
    "StepResult",
    "Subject",
    "apply_recipe",
    "bits",
    "completions",
    "conform",
    "host_of",
    "preferences",
    "read_tensors",
    "run_step",
    "same_bits",
    "save_tiny",
    "save_tokenizer",
    "texts",
    "tiny",
    "tree",
    "write_adapter",
    "write_checkpoint",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'regraft.testing' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
