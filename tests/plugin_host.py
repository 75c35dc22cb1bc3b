"""Hosts with plugins made up by a test, beside our own."""

import itertools
import sys
import types
from importlib.metadata import EntryPoint, entry_points

from regraft.core.hookspecs import hookimpl
from regraft.core.host import GROUP, Host

_NUMBERS = itertools.count()


def host_with(*transformations, **hooks):
    """A host with our plugins and one named `toy` that brings these transformations and hooks (functions by name)."""
    module = types.ModuleType(f"toy_plugin_{next(_NUMBERS)}")
    hooks = {"regraft_transformations": lambda: list(transformations), **hooks}
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function, specname=name))
    sys.modules[module.__name__] = module
    try:
        return Host([EntryPoint("toy", module.__name__, GROUP), *entry_points(group=GROUP)], {})
    finally:
        del sys.modules[module.__name__]
