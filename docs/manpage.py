"""The manual page regraft(1) from the typer application, in the man(7) macros."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import typer

from regraft.cli.main import app

EXIT_CODES = {
    0: "done",
    1: "a transformation or a verification failed; for diff, the checkpoints differ",
    2: "usage, or the recipe",
    3: "an input cannot be read or is not valid",
    4: "resources: disk, memory, device, or the target cannot be written, or the result not be printed",
    5: "a plugin is at fault",
    130: "interrupted",
}
ENVIRONMENT = {
    "REGRAFT_DISABLE_PLUGINS": "Plugins that are not loaded, separated by commas; all: those of other packages.",
    "REGRAFT_PLUGINS": "The only third-party plugins that are loaded, separated by commas.",
    "REGRAFT_CACHE": "Folder of the step cache; by default regraft in $XDG_CACHE_HOME or ~/.cache.",
    "HF_HOME, HF_TOKEN, HF_HUB_OFFLINE": "As huggingface_hub reads them: its cache, the hub's token, and no network.",
    "NO_COLOR": "No colours on a terminal.",
}


def page() -> Iterator[str]:
    """The lines of the page. It has no date, so that it changes only when the commands do."""
    root = typer.main.get_command(app)
    yield '.\\" written by docs/generate.py: change the code, then run nox -s docs -- write'
    yield f'.TH REGRAFT 1 "" "regraft {version("regraft")}" "User Commands"'
    yield ".SH NAME"
    yield "regraft \\- rewrite language\\-model checkpoints"
    yield ".SH SYNOPSIS"
    yield ".B regraft\n.I COMMAND\n[\\fIoptions\\fR] [\\fIarguments\\fR]"
    yield ".SH DESCRIPTION"
    yield _text(
        "A recipe in TOML names a base checkpoint, a chain of transformations, and an output. regraft apply reads the "
        "base once, streams every tensor through the chain, and writes one new, verified safetensors checkpoint."
    )
    yield ".SH COMMANDS"
    for name, command in root.commands.items():
        yield from _command(name, command)
    yield ".SH EXIT STATUS"
    yield from _list({str(code): meaning for code, meaning in EXIT_CODES.items()})
    yield ".SH ENVIRONMENT"
    yield from _list(ENVIRONMENT)
    yield ".SH EXAMPLES"
    yield ".nf\nregraft plan quickstart\nregraft apply quickstart\nregraft verify out/quickstart \\-\\-deep\n.fi"


def _command(path: str, command: Any) -> Iterator[str]:
    required = [parameter.metavar or parameter.name.upper() for parameter in command.params if _is_argument(parameter)]
    yield f".SS {_text(' '.join([path, *required]))}"
    yield _text(inspect.cleandoc(command.help or ""))
    options = {}
    for parameter in command.params:
        if _is_argument(parameter) or getattr(parameter, "hidden", False):
            continue
        value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
        options[", ".join([*parameter.opts, *parameter.secondary_opts]) + value] = parameter.help or ""
    yield from _list({name: meaning for name, meaning in options.items() if meaning})
    for name, below in getattr(command, "commands", {}).items():
        yield from _command(f"{path} {name}", below)


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _list(items: dict[str, str]) -> Iterator[str]:
    for name, meaning in items.items():
        yield f".TP\n.B {_text(name)}\n{_text(meaning)}"


def _text(text: str) -> str:
    """`text` as roff: backslashes and hyphens escaped, no line that begins like a request, no Markdown quotes."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    return "\n".join(f"\\&{line}" if line[:1] in (".", "'") else line for line in plain.split("\n"))
