"""What a user reads who has not written TOML."""

import pytest

from regraft.core.errors import RecipeError
from regraft.core.recipe.syntax import parse_toml

CLOSE = "end it with the quotes it began with"
MESSAGES = [
    ("model = demo:tiny", 'r.toml:1:9: expected a value, found demo:tiny (put text in quotes: "demo:tiny")'),
    ("a =", 'r.toml:1:4: expected a value after "="'),
    ("a = True", "r.toml:1:5: expected a value, found True (write true)"),
    ("a = null # none", "r.toml:1:5: expected a value, found null (TOML has no null: leave the key out)"),
    ("a = [None]", "r.toml:1:6: expected a value, found None (TOML has no null: leave the key out)"),
    ("\na", 'r.toml:2:2: expected "=" after the key'),
    ("base:\n", 'r.toml:1:5: expected "=" after the key (TOML writes key = value)'),
    (
        'a = "x\nb = 1',
        f"r.toml:1:7: a string is not closed on this line ({CLOSE}; text over several lines needs triple quotes)",
    ),
    (
        "a = 'x\nb = '1'",
        f"r.toml:1:7: a string is not closed on this line ({CLOSE}; text over several lines needs triple quotes)",
    ),
    ('b = 1\na = """x\n\n', f"r.toml:2:7: a string that begins in this line is never closed ({CLOSE})"),
    ("a = '''x\n", f"r.toml:1:7: a string that begins in this line is never closed ({CLOSE})"),
    ("b = 1\n\na = [1,\n2\n", 'r.toml:3:1: an array that begins in this line is never closed (end it with "]")'),
    ("a = [1,\n", 'r.toml:1:1: an array that begins in this line is never closed (end it with "]")'),
    ("a = {b = 1", 'r.toml:1:1: an inline table that begins in this line is never closed (end it with "}")'),
    ("a = {b = 1,\n", 'r.toml:1:1: an inline table that begins in this line is never closed (end it with "}")'),
    ("a = [1 2]", 'r.toml:1:8: expected "," or "]" in the array'),
    ("a = {b = 1 c = 2}", 'r.toml:1:12: expected "," or "}" in the inline table'),
    ("[a\nb = 1", 'r.toml:1:3: expected "]" after the name of the table'),
    ("[[steps]\n", 'r.toml:1:8: expected "]]" after the name of the array of tables (write [[steps]])'),
    (
        'a = "C:\\models"',
        "r.toml:1:8: unknown escape in a string (put text with backslashes in single quotes, or double each backslash)",
    ),
    ('a = "\\uZZ"', "r.toml:1:8: expected hexadecimal digits after the escape \\x, \\u or \\U"),
    ('a = "\\ud800"', "r.toml:1:12: the escape names no Unicode character"),
    ("a = 2024-02-31", "r.toml:1:5: there is no such date or time"),
    (
        "a = 7b-model",
        'r.toml:1:6: unexpected "b-model" after the value (text needs quotes; each key needs its own line)',
    ),
    ("a = 1\nb = 2\na = 3", "r.toml:3:1: a: already set in line 1 (keep one of them)"),
    ("[base]\nx = 1\n[base]\n", "r.toml:3:2: base: already set in line 1 (keep one of them)"),
    ("[[s]]\na.b = 1\n[s.a]\n", "r.toml:3:4: s[0].a: already set in line 2 (keep one of them)"),
    ("a = 1\na.b = 2", "r.toml:2:3: a.b: a is already set in line 1 (keep one of them)"),
    ("a = [1]\n[[a]]", "r.toml:2:3: a: already set in line 1 (keep one of them)"),
    ("a = '''\n'''\nb = 1\nb = '''\n'''", "r.toml:4:1: b: already set in line 3 (keep one of them)"),
    ("a = {b = 1, b = 2}", 'r.toml:1:18: the key "b" stands twice in an inline table (keep one of them)'),
    ("= 1", "r.toml:1:1: expected a key, a [table] or a comment"),
    ("a. = 1", "r.toml:1:4: expected a key (keys are made of letters, digits, - and _; put any other in quotes)"),
    ('a = "\x07"', "r.toml:1:6: the control character U+0007 is not allowed here (delete it)"),
    (
        '{"base": {}}',
        "r.toml:1:1: expected TOML, found what looks like JSON (a recipe is TOML: [tables] and key = value lines)",
    ),
    (
        f"b = 1\r\na = {'9' * 5000}",
        "r.toml:2:5: the integer is too long (integers have at most 64 bits)",
    ),
    ("a = " + "[" * 500, "r.toml: tables and arrays go deeper than 64 levels"),
    (".".join("a" * 3000) + " = 1", "r.toml: tables and arrays go deeper than 64 levels"),
]


@pytest.mark.parametrize(("text", "message"), MESSAGES, ids=[text[:24] for text, _ in MESSAGES])
def test_message(text, message):
    with pytest.raises(RecipeError) as caught:
        parse_toml(text, "r.toml")
    assert [str(problem) for problem in caught.value.problems] == [message]
