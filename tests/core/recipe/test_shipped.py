from pathlib import Path

import pytest

from regraft.core.errors import RecipeError
from regraft.core.recipe import shipped


@pytest.fixture
def recipes(inside, monkeypatch):
    folder = inside / "shipped"
    folder.mkdir()
    (folder / "quickstart.toml").write_text("a = 1\n")
    (folder / "long-context.toml").write_text("b = 1\n")
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(shipped, "_folder", lambda: folder)
    return folder


def test_names_paths_and_texts(recipes):
    assert shipped.shipped_names() == ["long-context", "quickstart"]
    assert shipped.shipped_path("quickstart") == recipes / "quickstart.toml"
    assert shipped.shipped_text("quickstart") == "a = 1\n"
    with pytest.raises(RecipeError, match='did you mean "quickstart"'):
        shipped.shipped_text("quikstart")


def test_the_package_is_found():
    assert (shipped._folder() / "__init__.py").is_file()


def test_a_path_wins_over_a_shipped_name(recipes):
    assert shipped.find_recipe("quickstart") == recipes / "quickstart.toml"
    assert shipped.find_recipe("missing.toml") == Path("missing.toml")
    assert shipped.find_recipe("missing/quickstart") == Path("missing/quickstart")
    Path("quickstart").mkdir()
    assert shipped.find_recipe("quickstart") == recipes / "quickstart.toml"
    Path("quickstart").rmdir()
    Path("quickstart").write_text("")
    assert shipped.find_recipe("quickstart") == Path("quickstart")
    Path("folder").mkdir()
    assert shipped.find_recipe("folder") == Path("folder")


def test_unknown_names(recipes):
    def message(name):
        with pytest.raises(RecipeError) as caught:
            shipped.find_recipe(name)
        (problem,) = caught.value.problems
        return str(problem)

    ships = "shipped recipes: long-context, quickstart"
    neither = "is neither a file nor the name of a shipped recipe"
    assert message("quikstart") == f'"quikstart" {neither} (did you mean "quickstart"? {ships})'
    assert message("rope") == f'"rope" {neither} ({ships})'
    Path("mine.toml").write_text("")
    assert message("mine") == f'"mine" {neither} (did you mean "mine.toml"? {ships})'
    assert message("mnie") == f'"mnie" {neither} (did you mean "mine.toml"? {ships})'
