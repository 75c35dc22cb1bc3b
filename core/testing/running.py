"""One step or one recipe in a call, as a recipe would run it, with transformations that need not be installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from regraft.core.checkpoint import Checkpoint
from regraft.core.errors import TransformationError
from regraft.core.hookspecs import hookimpl
from regraft.core.host import GROUP, OWN_DISTRIBUTION, Host
from regraft.core.patch import Outline, Patch, overlay
from regraft.core.transformation import AnyTransformation, Run

if TYPE_CHECKING:
    from pydantic import BaseModel

    from regraft.core.execute import ApplyReport
    from regraft.core.recipe.model import Recipe

PLUGIN = "testing"
"""How the host calls the plugin that brings what is not installed."""


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        params: as validated.
        outline: what the plan promised.
        patch: what the step returned; it keeps the promise.
        below: the checkpoint that the step saw.
        checkpoint: `below` seen through the patch; `checkpoint.load(name)` computes a tensor.
    """

    params: BaseModel
    outline: Outline
    patch: Patch
    below: Checkpoint
    checkpoint: Checkpoint


def run_step(
    transformation: type[AnyTransformation],
    base: Checkpoint | Path | str,
    params: Mapping[str, Any] | None = None,
    *,
    run: Run | None = None,
) -> StepResult:
    """Check, plan and apply one step; writes nothing.

    Args:
        transformation: the class; it need not be installed.
        base: a checkpoint, or where one is.
        params: as a recipe writes them; paths start at the current folder.
        run: what the step is handed; by default step `step`, on the CPU, seed 0.

    Raises:
        RecipeError: a parameter is unknown or has the wrong type.
        TransformationError: the patch is not what the plan said.
        RegraftError: what the transformation says.
    """
    from regraft.core.sources import open_checkpoint

    below = base if isinstance(base, Checkpoint) else open_checkpoint(str(base))
    run = run or Run("step")
    step = {"use": transformation, "id": run.step, **(params or {})}
    (validated,) = make_recipe("demo:tiny", step).steps
    made = transformation()
    made.check(below, validated.params)
    outline = made.plan(below, validated.params)
    patch = made.apply(below, validated.params, run)
    if deviations := outline.deviations(patch):
        raise TransformationError(
            "the patch is not what the plan said", where=transformation.name, found=", ".join(deviations),
            remedy="make plan and apply decide by the same function",
        )  # fmt: skip
    return StepResult(validated.params, outline, patch, below, overlay(below, patch, by=run.step))


def apply_recipe(
    base: Path | str,
    *steps: Mapping[str, Any],
    to: Path | str,
    seed: int = 0,
    threads: int = 1,
    save_patches: Path | None = None,
    **output: Any,
) -> ApplyReport:
    """Run a recipe and write its output, as `regraft apply --no-cache` does: what a step gives is always computed.

    Args:
        base: what `[base] model` says.
        steps: each as a recipe writes it; `use` may be a class, which need not be installed.
        to: the folder to write.
        seed: the recipe's.
        threads: workers of the writer.
        save_patches: folder for each step's patch.
        output: keys of `[output]`.

    Raises:
        RegraftError: whatever `regraft apply` would say.
    """
    from regraft.core.execute import ApplyOptions, apply

    options = ApplyOptions(device="cpu", threads=threads, durable=False, save_patches=save_patches, cache=False)
    recipe = make_recipe(base, *steps, seed=seed, **output)
    return apply(recipe, Path(to), host_of(*_classes(steps)), options)


def make_recipe(base: Path | str, *steps: Mapping[str, Any], seed: int = 0, **output: Any) -> Recipe:
    """The validated recipe of `apply_recipe`; paths start at the current folder.

    Raises:
        RecipeError: everything that is wrong with it.
    """
    from regraft.core.recipe.load import recipe_from

    found = host_of(*_classes(steps))
    named = [{**step, "use": step["use"] if isinstance(step["use"], str) else step["use"].name} for step in steps]
    data = {"schema": 1, "name": "testing", "seed": seed, "base": {"model": str(base)}, "steps": _plain(named)}
    return recipe_from({**data, "output": output}, "testing.toml", (), found.transformations(), found.broken)


def host_of(*transformations: type[AnyTransformation], **hooks: Callable[..., Any]) -> Host:
    """Our own plugins, those installed with the package of a transformation, and one that brings what is missing.

    Args:
        transformations: classes that recipes are to know.
        hooks: implementations of other hooks, by the hook's name.
    """
    return _with(transformations, hooks) if hooks else _without_hooks(*transformations)


@lru_cache(maxsize=32)
def _without_hooks(*transformations: type[AnyTransformation]) -> Host:
    return _with(transformations, {})


def _with(transformations: tuple[type[AnyTransformation], ...], hooks: Mapping[str, Callable[..., Any]]) -> Host:
    packages = {kind.__module__.partition(".")[0] for kind in transformations} - {OWN_DISTRIBUTION}
    entries = [entry for entry in entry_points(group=GROUP) if _is_wanted(entry, packages)]
    found = Host(entries, {})
    missing = [kind for kind in transformations if found.transformations().get(kind.name) is not kind]
    if not missing and not hooks:
        return found
    module = ModuleType(PLUGIN)
    for name, function in {"regraft_transformations": lambda: missing, **hooks}.items():
        setattr(module, name, hookimpl(function, specname=name))
    return Host([*entries, cast("EntryPoint", _InMemory(module))], {})


def _is_wanted(entry: EntryPoint, packages: set[str]) -> bool:
    return (entry.dist is not None and entry.dist.name == OWN_DISTRIBUTION) or entry.module.split(".")[0] in packages


@dataclass(frozen=True)
class _InMemory:
    """What the host asks of an entry point, for a module that is not installed."""

    module: ModuleType
    name: str = PLUGIN
    value: str = PLUGIN
    dist: Distribution | None = None

    def load(self) -> ModuleType:
        return self.module


def _classes(steps: tuple[Mapping[str, Any], ...]) -> list[type[AnyTransformation]]:
    return list(dict.fromkeys(step["use"] for step in steps if not isinstance(step["use"], str)))


def _plain(value: Any) -> Any:
    """`value` as TOML would give it: paths as text, tuples as arrays."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
