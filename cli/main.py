"""The `regraft` command: which subcommands there are, and what becomes of an error."""

from __future__ import annotations

import gc
import sys
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from regraft.cli import (
    apply,
    cache,
    check,
    diff,
    evaluate,
    generate,
    inspect,
    plan,
    plugins,
    push,
    recipes,
    report,
    reproduce,
    schema,
    verify,
)
from regraft.cli.console import INTERRUPTED, fail, interrupted
from regraft.cli.streams import settle_streams
from regraft.core.errors import RegraftError, UsageError
from regraft.core.interrupts import Interrupted, ignore, listen, unbroken
from regraft.core.processes import Ended, processes

_CommandLineError: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""The base of typer's own errors: click's, or that of the copy of click which newer releases of typer bring."""


class Commands(TyperGroup):
    """Built-in commands first; plugins are loaded only for `--help` and for a command that is not built in."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            self._add_plugin_commands()
            command = super().get_command(ctx, cmd_name)
        return command

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name, in the order of a day's work."""
        from regraft.core.host import third_party_installed

        if third_party_installed():
            self._add_plugin_commands()
        return list(self.commands)

    def _add_plugin_commands(self) -> None:
        from regraft.core.host import host

        extra = typer.Typer()
        host().add_commands(extra)
        if extra.registered_commands or extra.registered_groups:
            group = typer.main.get_group(extra)
            for name, command in group.commands.items():
                self.commands.setdefault(name, command)


app = typer.Typer(
    cls=Commands,
    name="regraft",
    help="Rewrite language-model checkpoints: one recipe, one read, one verified safetensors checkpoint.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"regraft {version('regraft')}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show the Python traceback of an error.")] = False,
) -> None:
    """Rewrite language-model checkpoints: one recipe, one read, one verified safetensors checkpoint."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(UsageError.exit_code)


for _module in (apply, plan, check, inspect, diff, report, verify, reproduce, push, generate, schema):
    app.command()(getattr(_module, _module.__name__.rpartition(".")[2]))
app.command("eval")(evaluate.evaluate)
app.add_typer(plugins.app, name="plugins")
app.add_typer(recipes.app, name="recipes")
app.add_typer(cache.app, name="cache")


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code: 0, 1, 2, 3, 4, 5, or 130."""
    given = sys.argv[1:] if arguments is None else arguments
    gc.set_threshold(100_000)  # starting makes many objects and little garbage: a tenth of the CPU time
    settle_streams()
    listen()
    try:
        code = _settle(given)
    except Interrupted:
        code = _failed(given, None)
    sys.exit(code or 0)


def _settle(given: list[str]) -> Any:
    """The exit code; once it is known, a signal changes nothing any more."""
    try:
        code = _command(given)
    except _CommandLineError as error:
        code = _failed(given, _usage(error))
    except Ended as ending:
        code = ending.code
    except SystemExit as ending:  # into which typer turns every broken pipe, such as one to a process of ours
        broken = ending.__context__
        code = _failed(given, broken) if isinstance(broken, BrokenPipeError) else ending.code
    except BaseException as error:
        if "--traceback" in given or not (isinstance(error, Exception) or _panics(error)):
            raise
        code = _failed(given, error)
    ignore()
    return code


def _command(given: list[str]) -> Any:
    """Run it, and print all that it has to say: what cannot be printed is an error like others."""
    try:
        code = app(
            args=[argument for argument in given if argument != "--traceback"],
            prog_name="regraft",
            standalone_mode=False,
        )
    except Exception:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def _panics(error: BaseException) -> bool:
    """Whether it comes from Rust code that gave up, as tokenizers may on a hostile file: its class is no Exception."""
    return type(error).__name__ == "PanicException"


def _failed(given: list[str], error: BaseException | None) -> int:
    """Say what went wrong, unless another process of the same run has done so; gives the exit code. None: a signal."""
    as_json = "--json" in given
    code = error.exit_code if isinstance(error, RegraftError) else INTERRUPTED if error is None else 1
    with unbroken():
        if "apply" in given:
            with suppress(UsageError):  # of an environment that says nothing of other processes
                first, code = processes().ending(code)
                if not first:
                    return code
        return interrupted(as_json=as_json) if error is None else fail(error, as_json=as_json)


def _usage(error: Any) -> UsageError:
    """What typer says of a command line that it does not understand, in the words and form of every other error."""
    command = error.ctx.command_path if getattr(error, "ctx", None) else "regraft"
    text = error.format_message()
    return UsageError(text[:1].lower() + text[1:].rstrip("."), where=command, remedy=f"see `{command} --help`")


if __name__ == "__main__":
    run()
