"""The plugin host: finds plugins by entry point, loads them in isolation, and alone calls their hooks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import EntryPoint, entry_points
from inspect import getattr_static
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pluggy

from regraft.core import hookspecs
from regraft.core.errors import PluginError, RegraftError

if TYPE_CHECKING:
    import typer

    from regraft.core.architectures import Family
    from regraft.core.checkpoint import Checkpoint
    from regraft.core.evaluate.metric import AnyMetric
    from regraft.core.patch import Patch
    from regraft.core.sources import Source
    from regraft.core.transformation import AnyTransformation

GROUP = "regraft"
OWN_DISTRIBUTION = "regraft"
DISABLE = "REGRAFT_DISABLE_PLUGINS"
ONLY = "REGRAFT_PLUGINS"


@dataclass(frozen=True)
class PluginInfo:
    """One installed plugin: where it comes from, and why it is not in use if it is not."""

    name: str
    module: str
    distribution: str
    version: str
    status: str = "loaded"
    reason: str = ""


class _NotAsked(Exception):
    """A hook returned what it is not asked for; the text says so behind the hook's name."""


class Host:
    """The plugins of this process. `host()` gives the one that commands share; tests build their own.

    Args:
        entries: entry points to load, in order.
        environment: `REGRAFT_DISABLE_PLUGINS` is `all` (every plugin that is not part of regraft) or names separated
            by commas; `REGRAFT_PLUGINS`, if set, lists the only third-party plugins that are loaded.
    """

    def __init__(self, entries: Sequence[EntryPoint], environment: Mapping[str, str] = os.environ) -> None:
        self._manager = pluggy.PluginManager("regraft")
        self._manager.add_hookspecs(hookspecs)
        self._environment = environment
        self._owners: dict[str, str] = {}
        found = [(_info(entry), entry) for entry in entries]
        found.sort(key=lambda pair: (not _is_own(pair[0]), pair[0].name))
        loaded = [self._load(info, entry) for info, entry in found]
        self.plugins = sorted(loaded, key=lambda info: (_is_own(info), info.name))
        """Third-party plugins first, by name, so that their sources are asked before ours; ours after them, by name."""

    def transformations(self) -> Mapping[str, type[AnyTransformation]]:
        """Every transformation by name.

        Raises:
            PluginError: two plugins bring the same name.
        """
        return self._transformations

    @property
    def owners(self) -> Mapping[str, str]:
        """Which plugin brings a transformation, by the transformation's name."""
        self.transformations()
        return self._owners

    @property
    def broken(self) -> Mapping[str, str]:
        """Why a plugin cannot be used, by the plugin's name (and so, by custom, by its transformation's name)."""
        self.transformations()  # calling the hooks finds the plugins that break when they are called
        return {info.name: info.reason for info in self.plugins if info.status == "broken"}

    @cached_property
    def _transformations(self) -> dict[str, type[AnyTransformation]]:
        from regraft.core.transformation import fault_of

        found: dict[str, type[AnyTransformation]] = {}
        for plugin, transformation in self._items("regraft_transformations", fault_of):
            name = transformation.name
            if name in found:
                first = self._owners[name]
                raise PluginError(
                    "two plugins bring the same transformation",
                    where=name,
                    found=f"{first} and {plugin}",
                    remedy=f"uninstall one, or set {DISABLE}={first}",
                )
            found[name], self._owners[name] = transformation, plugin
        return found

    def sources(self) -> list[Source]:
        """Sources that plugins bring, in the order in which they are asked."""
        return [source for _, source in self._items("regraft_sources", _source_fault)]

    def architectures(self) -> list[Family]:
        """Model families that plugins bring."""
        from regraft.core.architectures import Family

        def fault(item: object) -> str:
            return "" if isinstance(item, Family) else "is no Family"

        return [family for _, family in self._items("regraft_architectures", fault)]

    def metrics(self) -> Mapping[str, type[AnyMetric]]:
        """Metrics that plugins bring, by name.

        Raises:
            PluginError: two plugins bring the same name.
        """
        from regraft.core.evaluate.metric import fault_of

        found: dict[str, tuple[str, type[AnyMetric]]] = {}
        for plugin, metric in self._items("regraft_metrics", fault_of):
            if metric.name in found:
                first = found[metric.name][0]
                raise PluginError(
                    "two plugins bring the same metric",
                    where=metric.name,
                    found=f"{first} and {plugin}",
                    remedy=f"uninstall one, or set {DISABLE}={first}",
                )
            found[metric.name] = plugin, metric
        return {name: metric for name, (_, metric) in found.items()}

    def ask(self) -> None:
        """Call every hook that brings something, so that the status of each plugin says whether it works.

        Raises:
            PluginError: two plugins bring the same name.
        """
        for bringing in (self.transformations, self.sources, self.architectures, self.metrics):
            bringing()

    def add_commands(self, app: typer.Typer) -> None:
        """Let plugins register commands on `app`."""
        for _ in self._each("regraft_commands", app=app):
            pass

    def before_step(self, step: str, checkpoint: Checkpoint) -> None:
        """Tell plugins that a step begins.

        Raises:
            PluginError: a plugin raised.
        """
        for _ in self._each("regraft_before_step", fatal=True, step=step, checkpoint=checkpoint):
            pass

    def after_step(self, step: str, checkpoint: Checkpoint, patch: Patch) -> None:
        """Tell plugins that a step has returned its patch.

        Raises:
            PluginError: a plugin raised.
        """
        for _ in self._each("regraft_after_step", fatal=True, step=step, checkpoint=checkpoint, patch=patch):
            pass

    def _items(self, hook: str, fault: Callable[[object], str]) -> Iterator[tuple[str, Any]]:
        """What plugins bring through `hook`, each with the plugin's name; one that brings anything else is broken."""

        def checked(result: Any) -> list[Any]:
            if result is None:
                raise _NotAsked("returned None, not a sequence")
            items = list(result)
            for item in items:
                if message := fault(item):
                    raise _NotAsked(f"returned {item!r}, which {message}")
            return items

        for plugin, items in self._each(hook, checked):
            for item in items:
                yield plugin, item

    def _each(
        self, hook: str, use: Callable[[Any], Any] = lambda result: result, *, fatal: bool = False, **arguments: Any
    ) -> Iterator[tuple[str, Any]]:
        """Call `hook` plugin by plugin, so that one that raises is named and costs nobody else."""
        for index, info in enumerate(self.plugins):
            module = self._manager.get_plugin(info.name)
            if info.status != "loaded" or module is None:
                continue
            others = [plugin for name, plugin in self._manager.list_name_plugin() if name != info.name and plugin]
            caller = self._manager.subset_hook_caller(hook, others)
            if not caller.get_hookimpls():
                continue
            try:
                results = caller(**arguments)
                result = use(results[0] if results else None)
            except Exception as error:
                what = "" if isinstance(error, _NotAsked) else f"raised {type(error).__name__}: "
                reason = f"{hook} {what}{error}"
                if fatal:
                    raise PluginError(
                        f"the plugin failed: {reason}",
                        where=info.name,
                        remedy=f"report it to {info.distribution}, or set {DISABLE}={info.name}",
                    ) from error
                self.plugins[index] = _broken(info, reason)
                continue
            yield info.name, result

    def _load(self, info: PluginInfo, entry: EntryPoint) -> PluginInfo:
        if reason := self._excluded(info):
            return PluginInfo(**{**vars(info), "status": "disabled", "reason": reason})
        try:
            module = entry.load()
            _check_api(module)
            self._register(module, entry.name)
        except RegraftError as error:
            return _broken(info, error.message)
        except (Exception, SystemExit) as error:
            return _broken(info, f"{type(error).__name__}: {error}")
        return info

    def _register(self, module: object, name: str) -> None:
        if self._manager.has_plugin(name):
            raise PluginError(f"another plugin is called {name}")
        if (other := self._manager.get_name(module)) is not None:
            raise PluginError(f"is the module of the plugin {other}")
        try:
            self._manager.register(module, name=name)
            self._manager.check_pending()
            fault = _unmarked(module, {caller.name for caller in self._manager.get_hookcallers(module) or ()})
        except pluggy.PluginValidationError as error:
            fault = str(error).splitlines()[0]
        if fault:
            self._manager.unregister(name=name)
            raise PluginError(fault)

    def _excluded(self, info: PluginInfo) -> str:
        own = _is_own(info)
        disabled = _names(self._environment.get(DISABLE, ""))
        if info.name in disabled or ("all" in disabled and not own):
            return f"{DISABLE} says so"
        only = self._environment.get(ONLY)
        if only is not None and not own and info.name not in _names(only):
            return f"{ONLY} does not name it"
        return ""


@cache
def host() -> Host:
    """The host of this process, with every installed plugin."""
    return Host(list(entry_points(group=GROUP)))


def third_party_installed() -> bool:
    """Whether any plugin that is not part of regraft is installed; loads none."""
    return any(not _is_own(_info(entry)) for entry in entry_points(group=GROUP))


def _is_own(info: PluginInfo) -> bool:
    return info.distribution == OWN_DISTRIBUTION


def _info(entry: EntryPoint) -> PluginInfo:
    distribution = entry.dist
    name = distribution.name if distribution else "unknown"
    return PluginInfo(entry.name, entry.value, name, distribution.version if distribution else "")


def _broken(info: PluginInfo, reason: str) -> PluginInfo:
    return PluginInfo(**{**vars(info), "status": "broken", "reason": reason})


def _check_api(module: object) -> None:
    wanted = getattr(module, "regraft_api", "")
    if not isinstance(wanted, str):
        raise PluginError(f"regraft_api is not a version range: {wanted!r}")
    if not wanted:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        fits = hookspecs.API_VERSION in SpecifierSet(wanted)
    except InvalidSpecifier:
        raise PluginError(f"regraft_api is not a version range: {wanted!r}") from None
    if not fits:
        raise PluginError(f"asks for plugin API {wanted}, this regraft has {hookspecs.API_VERSION}")


def _unmarked(module: object, hooks: set[str]) -> str:
    """Why a plugin with implementations of `hooks` is not what its author meant; empty if it may be.

    Functions that it imports from another package and are called like a hook are none of its own.
    """
    for name in (name for name in vars(hookspecs) if name.startswith("regraft_") and name not in hooks):
        found = getattr_static(module, name, None)
        if callable(found) and _package(found) == _package(module):
            return f"{name} is not marked with @hookimpl"
    return "" if hooks else "it has no hook: no function of it is marked with @hookimpl"


def _package(thing: object) -> str:
    """The package in which a module is, or in which a function or a class is defined."""
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", "")
    return str(name).partition(".")[0]


def _source_fault(item: object) -> str:
    missing = [name for name in ("name", "accepts", "open") if not hasattr(item, name)]
    return f"is no source: it has no {', '.join(missing)}" if missing else ""


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",") if name.strip()}
