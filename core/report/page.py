"""From facts to the bytes of a page: templates that escape everything, and a policy that lets the page load nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from regraft.core.errors import ResourceError, UsageError
from regraft.core.provenance import package_version
from regraft.core.report import numbers
from regraft.core.report.differing import Differing
from regraft.core.report.written import Written

TEMPLATES = Path(__file__).parent / "templates"
_SUFFIXES = (".html", ".htm")
_FILTERS = ("number", "nbytes", "value", "plural")


def written_page(facts: Written) -> bytes:
    """The page about one output; the same bytes for the same facts."""
    return _rendered("written.html.jinja", facts=facts)


def differing_page(facts: Differing) -> bytes:
    """The page about two checkpoints; the same bytes for the same facts."""
    return _rendered("differing.html.jinja", facts=facts)


def _rendered(template: str, **context: Any) -> bytes:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(TEMPLATES)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {name: getattr(numbers, name) for name in _FILTERS}
    style = (TEMPLATES / "style.css").read_text()
    text = environment.get_template(template).render(
        **context, style=Markup(style), policy=policy(style), version=package_version("regraft")
    )
    return text.encode("utf-8", "replace")


def policy(style: str) -> str:
    """The content security policy of a page: its own style sheet, pictures inside the page, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"


def check_page_path(path: Path, *inputs: Path) -> None:
    """Refuse a place that a page is not to be written to.

    Args:
        path: of the page.
        inputs: folders that are read.

    Raises:
        UsageError: it is no HTML file, or stands inside what is read.
    """
    if path.suffix.lower() not in _SUFFIXES or path.is_dir():
        raise UsageError("a page is an HTML file", where=path, expected="a name that ends with .html",
                         remedy="give it such a name")  # fmt: skip
    for folder in inputs:
        if folder.is_dir() and path.resolve().is_relative_to(folder.resolve()):
            raise UsageError("stands inside a checkpoint that is read", where=path, expected="a path outside it",
                             remedy="write it elsewhere: the checkpoint stays as it was verified")  # fmt: skip


def save_page(page: bytes, path: Path) -> None:
    """Write a page, whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(page)
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                Path(temporary).unlink()
        raise ResourceError(
            f"the page cannot be written: {error.strerror}", where=path, remedy="name another place, or make room"
        ) from None


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
