"""The runtimes that stand in checkpoints, in the parts that they are put together from.

Each part is an ordinary module, so that it is read, tested and type-checked like any other. In a checkpoint a runtime
is one file, for whoever has torch and tokenizers and not regraft. Parts import nothing but the standard library, torch,
tokenizers, safetensors and each other, and what they define has one name in all of them.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable

from regraft.core.errors import PluginError
from regraft.core.portable_code import portable_code, read_template

_CUTTING = ("spelling", "merging", "cutting", "opening")
DYNAMIC = (*_CUTTING, "network", "composing", "dynamic")
LARGE = (*_CUTTING, "searching", "large")


def runtime(parts: Iterable[str], *, extra: frozenset[str] = frozenset()) -> bytes:
    """One file from parts: the last one's docstring, the imports of all, and then the parts in order.

    Args:
        parts: names of modules of this package; each stands behind those that it imports.
        extra: packages that it may import beside those of `portable_code`.

    Raises:
        PluginError: two parts define one name; see also `portable_code`.
    """
    title = ""
    imports: dict[str, set[str]] = defaultdict(set)
    bodies: list[str] = []
    taken: dict[str, str] = {}
    for part in parts:
        text = read_template(__package__, f"{part}.py")
        tree = ast.parse(text)
        title = ast.get_docstring(tree, clean=False) or ""
        last = 0
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                _collect(node, imports)
                last = node.end_lineno or 0
            for name in _defined(node):
                if taken.setdefault(name, part) != part:
                    raise PluginError("two parts of a runtime define one name", where=f"{taken[name]}, {part}",
                                      found=name, remedy="report it to the plugin's author")  # fmt: skip
        bodies.append("".join(text.splitlines(keepends=True)[last:]).strip("\n"))
    head = [f'"""{title}"""', "from __future__ import annotations", _rendered(imports)]
    return portable_code("\n\n".join(head) + "\n\n" + "\n\n\n".join(bodies) + "\n", {}, extra=extra)


def _collect(node: ast.Import | ast.ImportFrom, imports: dict[str, set[str]]) -> None:
    """`import x` stands under "", `from x import y` under x; what is of this package comes with the parts."""
    module = (node.module or "") if isinstance(node, ast.ImportFrom) else ""
    if module != "__future__" and not module.startswith(__name__):
        imports[module].update(ast.unparse(name) for name in node.names)


def _defined(node: ast.stmt) -> list[str]:
    """Names that a statement of a module gives a meaning."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []


def _rendered(imports: dict[str, set[str]]) -> str:
    plain = [f"import {name}" for name in sorted(imports.get("", ()))]
    lines = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(imports.items()) if module]
    return "\n".join([*plain, *lines])
