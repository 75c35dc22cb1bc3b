# ruff: noqa: E501 - messages stand here as they are printed
"""Files, `extends`, and where inherited values come from."""

import os
from pathlib import Path

import pytest

from regraft.core.errors import RecipeError
from regraft.core.recipe.document import depth_exceeds, read_recipe


def message(path):
    with pytest.raises(RecipeError) as caught:
        read_recipe(Path(path))
    return [str(problem) for problem in caught.value.problems]


def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def test_files_that_are_no_recipe(inside):
    write("quick.toml", "")
    write("comment.toml", "# nothing\n")
    Path("latin.toml").write_bytes(b"a = 1\r\nn\xc3\xa4me = '\xe9'")
    Path("wide.toml").write_bytes("a = 1".encode("utf-16"))
    write("only/one.toml", "a = 1")
    empty = "(a recipe has [base] model, [[steps]] and [output] path; `regraft recipes` shows some)"
    utf8 = "(save the file as UTF-8)"
    assert message("quick.toml") == [f"quick.toml:1:1: the recipe is empty {empty}"]
    assert message("comment.toml") == [f"comment.toml:1:1: the recipe is empty {empty}"]
    assert message("quik.toml") == ['quik.toml: there is no such recipe file (did you mean "quick.toml"?)']
    assert message("x/quick.toml") == [
        "x/quick.toml: there is no such recipe file (`regraft recipes` lists those that ship with regraft)"
    ]
    assert message(".") == [".: expected a recipe file, found a folder (name the .toml file in it)"]
    assert message("only") == ["only: expected a recipe file, found a folder (name only/one.toml)"]
    assert message("latin.toml") == [f"latin.toml:2:9: expected UTF-8 text, found the byte 0xe9 {utf8}"]
    assert message("wide.toml") == [f"wide.toml:1:1: expected UTF-8 text, found UTF-16 {utf8}"]
    assert message("quick.toml/x") == ["quick.toml/x: the recipe cannot be read: not a directory"]
    assert message("x" * 300) == [f"{'x' * 300}: the recipe cannot be read: file name too long"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(inside):
    write("r.toml", "a = 1")
    Path("r.toml").chmod(0)
    assert message("r.toml") == ["r.toml: the recipe cannot be read: permission denied"]


def test_files_without_end_are_not_read_to_their_end():
    assert message("/dev/zero") == ["/dev/zero: the file is larger than 4 MiB, so it is no recipe (name a TOML recipe)"]


def test_a_byte_order_mark_and_windows_lines_are_accepted(inside):
    Path("r.toml").write_bytes(b"\xef\xbb\xbfa = 1\r\nb = 2\r\n")
    document, _ = read_recipe(Path("r.toml"))
    assert document.data == {"a": 1, "b": 2}
    assert (document.place(("b",)).line, document.place(("b",)).column) == (2, 1)


def test_other_versions_of_the_format(inside):
    for value, remedy in (
        ("2", "update regraft"),
        ("0", "write schema = 1 or leave it out"),
        ("true", "write schema = 1 or leave it out"),
    ):
        write("r.toml", f"a = 1\nschema = {value}\n")
        assert message("r.toml") == [
            f"r.toml:2:1: schema: this regraft reads recipes of schema 1, found {value} ({remedy})"
        ]


def test_depth(inside):
    write("r.toml", f"a = {'[' * 63}{']' * 63}")
    read_recipe(Path("r.toml"))
    write("r.toml", f"a = {'[' * 64}{']' * 64}")
    assert message("r.toml") == ["r.toml:1:1: tables and arrays go deeper than 64 levels"]
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert depth_exceeds(nested, 64)
    assert not depth_exceeds({"a": [1]}, 2)
    assert depth_exceeds({"a": [1]}, 1)


def test_extends_merges_tables_and_replaces_everything_else(inside):
    write("grand.toml", 'schema = 1\nname = "grand"\nseed = 1\n[output]\ndtype = "float16"\ndigest = "none"\n')
    write(
        "sub/parent.toml",
        'extends = "../grand.toml"\n[base]\nmodel = "m"\nx.y = 1\nx.z = [1, 2]\n[[steps]]\nuse = "p"\n',
    )
    write("r.toml", 'extends = "sub/parent.toml"\n[base.x]\nz = 3\n[output]\ndtype = "keep"\n[[steps]]\nuse = "c"\n')
    document, files = read_recipe(Path("r.toml"))
    assert document.data == {
        "extends": "sub/parent.toml",
        "seed": 1,
        "base": {"model": "m", "x": {"y": 1, "z": 3}},
        "output": {"dtype": "keep", "digest": "none"},
        "steps": [{"use": "c"}],
    }
    assert [str(file) for file in files] == ["r.toml", "sub/parent.toml", "sub/../grand.toml"]
    where = {path: str(document.place(path)) for path in document.places}
    assert where[("base", "model")] == "line 3 of sub/parent.toml"
    assert where[("base", "x", "y")] == "line 4 of sub/parent.toml"
    assert where[("base", "x", "z")] == "line 3 of r.toml"
    assert where[("output", "digest")] == "line 6 of sub/../grand.toml"
    assert where[("output", "dtype")] == "line 5 of r.toml"
    assert where[("steps", 0, "use")] == "line 7 of r.toml"
    assert document.place(("base", "model")).folder == Path("sub")
    assert str(document.place(("base", "x", "z", 0))) == "line 3 of r.toml"
    assert ("name",) not in where
    assert str(document.place(("nowhere", "at", "all"))) == "line 1 of r.toml"


def test_steps_of_the_parent_are_kept_if_the_child_has_none(inside):
    write("p.toml", '[[steps]]\nuse = "p"\n')
    write("r.toml", 'extends = "p.toml"\nseed = 1\n')
    document, _ = read_recipe(Path("r.toml"))
    assert document.data["steps"] == [{"use": "p"}]
    assert str(document.place(("steps", 0, "use"))) == "line 2 of p.toml"


def test_cycles_are_printed_as_a_chain(inside):
    write("a.toml", 'seed = 1\nextends = "sub/b.toml"\n')
    write("sub/b.toml", 'extends = "../c.toml"\n')
    write("c.toml", 'extends = "sub/b.toml"\n')
    chain = "sub/b.toml -> sub/../c.toml -> sub/../sub/b.toml"
    assert message("a.toml") == [
        f"sub/../c.toml:1:1: extends: the recipes extend each other in a circle: {chain} (remove one `extends`)"
    ]
    write("self.toml", 'extends = "./self.toml"\n')
    assert message("self.toml") == [
        "self.toml:1:1: extends: the recipes extend each other in a circle: self.toml -> self.toml (remove one `extends`)"
    ]


def test_what_extends_cannot_name(inside):
    write("sub/parent.toml", "")
    cases = {
        '"sub/parnt.toml"': 'there is no file sub/parnt.toml (did you mean "parent.toml"?)',
        '"other.toml"': "there is no file other.toml (paths start at the folder of the recipe)",
        '"/etc/r.toml"': 'expected a relative path, found "/etc/r.toml" (write it relative to the folder of this recipe)',
        '"~/r.toml"': 'expected a relative path, found "~/r.toml" (write it relative to the folder of this recipe)',
        "3": "expected the relative path of a recipe, found 3",
        '""': 'expected the relative path of a recipe, found ""',
        '"a\\u0000b"': 'expected the relative path of a recipe, found "a\\u0000b"',
    }
    for value, expected in cases.items():
        write("r.toml", f"extends = {value}\n")
        assert message("r.toml") == [f"r.toml:1:1: extends: {expected}"]
    write("r.toml", 'extends = "sub"\n')
    assert message("r.toml") == ["sub: expected a recipe file, found a folder (name sub/parent.toml)"]
    write("r.toml", 'extends = "sub/parent.toml"\n')
    assert message("r.toml")[0].startswith("sub/parent.toml:1:1: the recipe is empty")
    write("sub/parent.toml", "a = ")
    assert message("r.toml") == ['sub/parent.toml:1:5: expected a value after "="']
