"""The public API: what is documented is what is exported, each name from the one place that defines it."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

import regraft
import regraft.testing
from regraft.core.hookspecs import API_VERSION
from tests.helpers import run_python

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "api.md").read_text()
MODULES = {"regraft": regraft, "regraft.testing": regraft.testing}


def documented(module):
    """Names in the first columns of the tables below the module's heading."""
    section = re.split(r"(?m)^## ", PAGE)
    (text,) = [part for part in section if part.startswith(f"{module}\n")]
    return re.findall(r"(?m)^\| `(\w+)` \|", text)


@pytest.mark.parametrize("name", MODULES)
def test_what_is_documented_is_what_is_exported(name):
    found = documented(name)
    assert len(found) == len(set(found))
    assert set(found) == set(MODULES[name].__all__) == set(dir(MODULES[name]))


@pytest.mark.parametrize("name", MODULES)
def test_every_name_has_one_home_that_defines_it(name):
    module = MODULES[name]
    homes = [(home, item) for home, items in module._HOMES.items() for item in items]
    assert sorted(item for _, item in homes) == sorted(module.__all__)
    for home, item in homes:
        assert getattr(import_module(home), item) is getattr(module, item)


@pytest.mark.parametrize("name", MODULES)
def test_type_checkers_see_the_same_names(name):
    tree = ast.parse(Path(MODULES[name].__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = [alias.name for node in block.body for alias in node.names]
    assert sorted(imported) == sorted(MODULES[name].__all__)


def test_a_name_that_is_not_exported_is_an_attribute_error():
    for module in MODULES.values():
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            module.Nothing  # noqa: B018


def test_the_page_names_the_version():
    assert f"It is {API_VERSION}," in PAGE


def test_importing_the_api_is_cheap():
    program = """
        import sys
        import regraft, regraft.testing

        print(sorted({"torch", "transformers", "numpy", "pydantic", "pytest"} & set(sys.modules)))
    """
    assert run_python(program) == "[]\n"
