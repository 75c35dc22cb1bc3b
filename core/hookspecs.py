"""The hooks through which plugins, ours included, reach regraft.

The pluggy project is `regraft`. A plugin is a module named by an entry point of the group `regraft`. It may say
`regraft_api = ">=1,<2"`: a plugin that asks for an API range which does not contain `API_VERSION` is listed as broken
and not loaded. So is one with a hook that is not listed here, unless it is marked `optionalhook`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from regraft.core.architectures import Family
    from regraft.core.checkpoint import Checkpoint
    from regraft.core.evaluate.metric import AnyMetric
    from regraft.core.patch import Patch
    from regraft.core.sources import Source
    from regraft.core.transformation import AnyTransformation

API_VERSION = "1.0"

hookspec = pluggy.HookspecMarker("regraft")
hookimpl = pluggy.HookimplMarker("regraft")


@hookspec
def regraft_transformations() -> Sequence[type[AnyTransformation]]:
    """Transformations that recipes can use.

    Called once, when a command needs the names. Each class is instantiated without arguments for every step. Two
    plugins that bring the same name are an error that names both. May raise: then the plugin is listed as broken.
    Since API 1.0.
    """
    raise NotImplementedError


@hookspec
def regraft_sources() -> Sequence[Source]:
    """Places a base checkpoint can come from.

    Called once, when a base is opened. The first source whose `accepts(model)` is true opens it; plugins are asked
    before the built-in sources, in the order of their names. Since API 1.0.
    """
    raise NotImplementedError


@hookspec
def regraft_architectures() -> Sequence[Family]:
    """Model families beside the built-in ones: where their projections, norms, embeddings and heads are stored.

    Called once, when roles are first asked for. A row whose `model_type` is built in replaces the built-in row.
    Since API 1.0.
    """
    raise NotImplementedError


@hookspec
def regraft_metrics() -> Sequence[type[AnyMetric]]:
    """Metrics that `regraft eval --task` can name.

    Called once, when `regraft eval` runs. Each class is instantiated without arguments for every task. A name that is
    built in stays built in; two plugins that bring the same name are an error that names both. Since API 1.0.
    """
    raise NotImplementedError


@hookspec
def regraft_commands(app: typer.Typer) -> None:
    """Adds commands to the command line.

    Called for `regraft --help`, and for a command that is not built in. `app` is the typer application that the
    command is registered on; a name that is built in stays built in. Since API 1.0.
    """


@hookspec
def regraft_before_step(step: str, checkpoint: Checkpoint) -> None:
    """Called before a step of a recipe is applied.

    `step` is its id; `checkpoint` is the checkpoint as it stands at that step. An exception stops the run as a plugin
    fault (exit code 5). Since API 1.0.
    """


@hookspec
def regraft_after_step(step: str, checkpoint: Checkpoint, patch: Patch) -> None:
    """Called after a step has returned its patch, and before anything is written.

    `checkpoint` is what the step saw, `patch` what it returned. An exception stops the run as a plugin fault. Since
    API 1.0.
    """
