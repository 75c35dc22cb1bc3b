"""The plugin host: discovery, isolation, order and switches."""

from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest
import typer

from regraft.core.errors import PluginError
from regraft.core.hookspecs import hookimpl
from regraft.core.host import DISABLE, GROUP, ONLY, Host, host, third_party_installed
from regraft.core.patch import Patch
from regraft.core.transformation import Params, WeightSpace
from tests.helpers import run_python
from tests.third_party import regraft_example_plugin as example


@dataclass(frozen=True)
class Entry:
    """An entry point of a distribution that need not be installed."""

    name: str
    module: object
    distribution: str = "stranger"

    @property
    def value(self):
        return f"module_of_{self.name}"

    @property
    def dist(self):
        if not self.distribution:
            return None
        metadata = {"Name": self.distribution, "Version": "1.2"}
        return SimpleNamespace(name=self.distribution, version="1.2", metadata=metadata)

    def load(self):
        if isinstance(self.module, BaseException):
            raise self.module
        return self.module


def module(**hooks):
    """A plugin module: functions become hook implementations, the rest attributes."""
    made = ModuleType("plugin")
    for name, value in hooks.items():
        setattr(made, name, hookimpl(value) if callable(value) else value)
    return made


def nothing():
    return []


def transformation(called):
    class Made(WeightSpace[Params]):
        name = called
        summary = "Nothing."
        Params = Params

        def patch(self, checkpoint, params):
            return Patch()

    return Made


def bringing(*names):
    return module(regraft_transformations=lambda: [transformation(name) for name in names])


def statuses(found):
    return {info.name: info.status for info in found.plugins}


# What is installed


def test_our_own_plugins_come_through_the_same_door():
    own = [entry for entry in entry_points(group=GROUP) if entry.dist.name == "regraft"]
    found = Host(own)
    assert {info.name for info in found.plugins} >= {"context-extension", "lora-merge", "patch"}
    assert statuses(found) == {entry.name: "loaded" for entry in own}
    assert {"context-extension", "lora-merge", "patch"} <= set(found.transformations())
    assert all(found.owners[name] == name for name in ("context-extension", "lora-merge", "patch"))
    assert found.broken == {}
    for info in found.plugins:
        assert info.distribution == "regraft"
        assert info.version


def test_the_host_of_the_process_is_made_once():
    assert host() is host()
    assert {info.name for info in host().plugins} == {entry.name for entry in entry_points(group=GROUP)}


def test_third_parties_are_told_from_our_own(monkeypatch):
    monkeypatch.setattr("regraft.core.host.entry_points", lambda group: [Entry("patch", None, "regraft")])
    assert not third_party_installed()
    monkeypatch.setattr("regraft.core.host.entry_points", lambda group: [Entry("x", None)])
    assert third_party_installed()


def test_loading_our_own_plugins_imports_neither_torch_nor_transformers():
    program = """
        import sys
        from regraft.core.host import host

        found = host()
        assert found.transformations() and not found.broken
        found.sources(), found.architectures()
        print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
    """
    assert run_python(program, **{DISABLE: "all"}) == "[]\n"


def test_importing_the_host_loads_no_plugin():
    program = """
        import sys
        import regraft.core.host

        regraft.core.host.third_party_installed()
        print([name for name in sys.modules if name.startswith("regraft.plugins.")])
        print(sorted({"torch", "transformers", "pydantic"} & set(sys.modules)))
    """
    assert run_python(program) == "[]\n[]\n"


# Broken plugins


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (ImportError("no module named nowhere"), "ImportError: no module named nowhere"),
        (SyntaxError("bad"), "SyntaxError: bad"),
        (SystemExit(3), "SystemExit: 3"),
        (module(regraft_api=">=2"), "asks for plugin API >=2, this regraft has 1.0"),
        (module(regraft_api="two"), "is not a version range: 'two'"),
        (module(regraft_api=1), "is not a version range: 1"),
        (module(regraft_surces=nothing), "unknown hook 'regraft_surces'"),
        (module(regraft_before_step=lambda nonsense: None), "hook"),
    ],
)
def test_a_plugin_that_cannot_be_loaded_is_listed_and_costs_nobody_else(content, reason):
    found = Host([Entry("bad", content), Entry("good", bringing("fine"))], {})
    assert statuses(found) == {"bad": "broken", "good": "loaded"}
    assert reason in found.plugins[0].reason
    assert reason in found.broken["bad"]
    assert list(found.transformations()) == ["fine"]
    assert found.sources() == []


def test_an_optional_hook_of_another_version_is_no_fault():
    made = bringing("fine")
    made.regraft_future = hookimpl(lambda: None, optionalhook=True)
    assert statuses(Host([Entry("x", made)], {})) == {"x": "loaded"}


@pytest.mark.parametrize("api", ["", ">=1", "==1.*", ">=1.0,<2", "~=1.0"])
def test_ranges_that_hold_our_api_version_fit(api):
    assert statuses(Host([Entry("x", module(regraft_api=api, regraft_sources=nothing))], {})) == {"x": "loaded"}


def raising(error):
    def fail():
        raise error

    return fail


def lazily_raising():
    yield transformation("first")
    raise KeyError("second")


NoName = type(
    "NoName", (WeightSpace,), {"summary": "x", "Params": Params, "patch": lambda self, checkpoint, params: Patch()}
)
NoPatch = type("NoPatch", (WeightSpace,), {"name": "x", "summary": "x", "Params": Params})
NoParams = type("NoParams", (WeightSpace,), {"name": "x", "summary": "x", "Params": int, "patch": NoName.patch})


@pytest.mark.parametrize(
    ("hook", "implementation", "reason"),
    [
        (
            "regraft_transformations",
            raising(ZeroDivisionError("division by zero")),
            "raised ZeroDivisionError: division",
        ),
        ("regraft_transformations", lazily_raising, "raised KeyError"),
        ("regraft_transformations", lambda: 5, "not iterable"),
        ("regraft_transformations", lambda: None, "regraft_transformations returned None, not a sequence"),
        ("regraft_sources", lambda: None, "regraft_sources returned None, not a sequence"),
        ("regraft_transformations", lambda: ["context-extension"], "is not a subclass of Transformation"),
        ("regraft_transformations", lambda: [transformation("x")()], "is not a subclass of Transformation"),
        ("regraft_transformations", lambda: [NoName], "has no name"),
        ("regraft_transformations", lambda: [NoPatch], "does not define patch"),
        ("regraft_transformations", lambda: [NoParams], "Params that are a pydantic model"),
        ("regraft_sources", raising(OSError("disk")), "raised OSError: disk"),
        ("regraft_sources", lambda: ["a folder"], "is no source"),
        ("regraft_architectures", raising(ValueError("x")), "raised ValueError: x"),
        ("regraft_architectures", lambda: [{}], "is no Family"),
    ],
)
def test_a_plugin_that_fails_when_it_is_asked_is_listed_and_costs_nobody_else(hook, implementation, reason):
    good = {"regraft_transformations": lambda: [transformation("fine")], "regraft_sources": lambda: [example.Alias()]}
    found = Host([Entry("bad", module(**{hook: implementation})), Entry("good", module(**good))], {})
    assert list(found.transformations()) == ["fine"]
    assert [source.name for source in found.sources()] == ["example"]
    assert found.architectures() == []
    assert statuses(found) == {"bad": "broken", "good": "loaded"}
    assert reason in found.broken["bad"]


@pytest.mark.parametrize("result", [[], ()])
def test_a_plugin_may_bring_nothing(result):
    found = Host([Entry("x", module(regraft_transformations=lambda: result, regraft_sources=lambda: result))], {})
    assert found.transformations() == {}
    assert found.sources() == []
    assert statuses(found) == {"x": "loaded"}


FORGOTTEN = """
def regraft_transformations():
    raise RuntimeError("it was called")
"""
MARKED = """
@hookimpl
def regraft_sources():
    return []
"""
IN_A_CLASS = """
class Plugin:
    @hookimpl
    def regraft_sources(self):
        return []

    def regraft_transformations(self):
        raise RuntimeError("it was called")
"""


def written(source, name="stranger"):
    """The module that `source` makes."""
    made = ModuleType(name)
    made.hookimpl = hookimpl
    exec(source, vars(made))
    return made


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (written(FORGOTTEN), "regraft_transformations is not marked with @hookimpl"),
        (written(MARKED + FORGOTTEN), "regraft_transformations is not marked with @hookimpl"),
        (written(IN_A_CLASS).Plugin(), "regraft_transformations is not marked with @hookimpl"),
        (written("def regraft_transformation(): ..."), "no function of it is marked with @hookimpl"),
        (written(""), "no function of it is marked with @hookimpl"),
    ],
)
def test_a_forgotten_mark_is_told_and_nothing_of_the_plugin_is_called(plugin, reason):
    found = Host([Entry("bad", plugin), Entry("good", bringing("fine"))], {})
    assert list(found.transformations()) == ["fine"]
    assert found.sources() == []
    assert reason in found.broken["bad"]


def test_what_is_called_like_a_hook_and_comes_from_elsewhere_or_is_marked_under_another_name_is_no_fault():
    elsewhere = written(MARKED)
    elsewhere.regraft_transformations = written(FORGOTTEN, "another.package").regraft_transformations
    renamed = written(MARKED + FORGOTTEN)
    renamed.other = hookimpl(nothing, specname="regraft_transformations")
    in_a_class = written(IN_A_CLASS.partition("def regraft_transf")[0]).Plugin()
    found = Host([Entry("a", elsewhere), Entry("b", renamed), Entry("c", in_a_class)], {})
    assert (dict(found.transformations()), found.sources()) == ({}, [])
    assert found.broken == {}


def test_a_command_that_cannot_be_registered_breaks_its_plugin_alone():
    def register(app):
        raise RuntimeError("no")

    found = Host([Entry("a", module(regraft_commands=register)), Entry("example", example)], {})
    app = typer.Typer()
    found.add_commands(app)
    assert [command.name for command in app.registered_commands] == ["example-count"]
    assert statuses(found)["a"] == "broken"


# Names and order


def test_two_transformations_of_one_name_are_an_error_that_names_both():
    found = Host([Entry("one", bringing("same")), Entry("two", bringing("same"))], {})
    with pytest.raises(PluginError, match="same transformation") as caught:
        found.transformations()
    assert caught.value.where == "same"
    assert caught.value.found == "one and two"
    assert caught.value.exit_code == 5


def test_the_remedy_against_a_name_of_ours_is_to_disable_the_stranger():
    found = Host([Entry("lora-merge", bringing("lora-merge"), "regraft"), Entry("zeta", bringing("lora-merge"))], {})
    with pytest.raises(PluginError) as caught:
        found.transformations()
    assert f"{DISABLE}=zeta" in caught.value.remedy


@pytest.mark.parametrize("first", [True, False])
def test_a_stranger_cannot_take_the_name_of_our_plugin(first):
    ours, strange = Entry("patch", bringing("patch"), "regraft"), Entry("patch", bringing("other"), "stranger")
    found = Host([strange, ours] if first else [ours, strange], {})
    assert [(info.distribution, info.status) for info in found.plugins] == [
        ("stranger", "broken"),
        ("regraft", "loaded"),
    ]
    assert list(found.transformations()) == ["patch"]
    assert "another plugin is called patch" in found.broken["patch"]


def test_one_module_is_one_plugin():
    made = bringing("x")
    found = Host([Entry("a", made), Entry("b", made)], {})
    assert statuses(found) == {"a": "loaded", "b": "broken"}
    assert found.broken["b"] == "is the module of the plugin a"


def test_strangers_are_asked_before_us_and_by_name():
    def source(called):
        return SimpleNamespace(name=called, accepts=lambda reference: True, open=lambda reference: None)

    def plugin(called):
        return module(regraft_sources=lambda: [source(called)])

    entries = [
        Entry("a", plugin("ours a"), "regraft"),
        Entry("z", plugin("z")),
        Entry("b", plugin("ours b"), "regraft"),
    ]
    found = Host([*entries, Entry("c", plugin("c"), "")], {})
    assert [source.name for source in found.sources()] == ["c", "z", "ours a", "ours b"]
    assert [info.distribution for info in found.plugins] == ["unknown", "stranger", "regraft", "regraft"]


def test_results_do_not_depend_on_the_order_of_entry_points():
    entries = [Entry(name, bringing(f"t-{name}")) for name in "cab"]
    assert (
        list(Host(entries, {}).transformations())
        == list(Host(entries[::-1], {}).transformations())
        == ["t-a", "t-b", "t-c"]
    )


# Switches


@pytest.mark.parametrize(
    ("environment", "used"),
    [
        ({}, {"ours", "one", "two"}),
        ({DISABLE: ""}, {"ours", "one", "two"}),
        ({DISABLE: "one"}, {"ours", "two"}),
        ({DISABLE: " one , two "}, {"ours"}),
        ({DISABLE: "ours"}, {"one", "two"}),
        ({DISABLE: "all"}, {"ours"}),
        ({DISABLE: "all,ours"}, set()),
        ({ONLY: "two"}, {"ours", "two"}),
        ({ONLY: ""}, {"ours"}),
        ({ONLY: "one,two", DISABLE: "two"}, {"ours", "one"}),
    ],
)
def test_the_environment_disables_and_restricts(environment, used):
    loaded = []

    class Counting(Entry):
        def load(self):
            loaded.append(self.name)
            return super().load()

    entries = [
        Counting("ours", bringing("ours"), "regraft"),
        Counting("one", bringing("one")),
        Counting("two", bringing("two")),
    ]
    found = Host(entries, environment)
    assert set(found.transformations()) == used
    assert set(loaded) == used
    assert {name for name, status in statuses(found).items() if status == "disabled"} == {"ours", "one", "two"} - used
    assert all((DISABLE in info.reason or ONLY in info.reason) == (info.name not in used) for info in found.plugins)
    assert found.broken == {}
