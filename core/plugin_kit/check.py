"""Runs the conformance suite on every transformation of a package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from regraft.core.errors import UsageError
from regraft.core.plugin_kit.find import find_package
from regraft.core.recipe.suggest import did_you_mean
from regraft.core.testing.conformance.check import Outcome
from regraft.core.testing.conformance.subject import Subject
from regraft.core.testing.conformance.suite import check, conform
from regraft.core.testing.models import CONFIGS, VARIANTS

Listener = Callable[[str, Outcome], None]


def check_package(
    package: str,
    *,
    only: Sequence[str] = (),
    families: Sequence[str] = (),
    listen: Listener = lambda transformation, outcome: None,
) -> dict[str, list[Outcome]]:
    """The outcomes of all checks on all transformations of `package`, by the transformation's name.

    Args:
        package: the name of an installed package or plugin; or a folder with a pyproject.toml.
        only: names of the checks to run; all if empty.
        families: to try on; by default those of the usual ones that a transformation does not refuse.
        listen: told each outcome as it comes.

    Raises:
        UsageError: there is no such package, check or family.
        InputError: the folder declares no plugin.
        PluginError: a plugin of the package is broken.
    """
    for name in only:
        check(name)
    _check_families(families)
    found = find_package(package)
    _quieten_transformers()
    outcomes = {}
    for name, kind in found.transformations.items():
        with tempfile.TemporaryDirectory(prefix="regraft-check-") as folder:
            subject = Subject(kind, Path(folder), families=families)
            outcomes[name] = conform(subject, only=only, listen=partial(listen, name))
    return outcomes


def _quieten_transformers() -> None:
    """No progress bars and no advice while the tiny models are saved and loaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _check_families(families: Sequence[str]) -> None:
    known = [*CONFIGS, *VARIANTS]
    for family in families:
        if family not in known:
            raise UsageError(
                "no such tiny model", where="--family", expected=f"one of {', '.join(CONFIGS)}", found=family,
                remedy=did_you_mean(family, known) or "name one of these",
            )  # fmt: skip
