"""The command line: finds the command, and tells every problem in one line.

Statuses are those of `docs/cli.md`. Only typer and rich are loaded here, and of the commands only
the one that is called; it imports the rest when it runs.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any

import typer

from vesicle import __version__, processors
from vesicle.commands import GROUPS, SUMMARIES
from vesicle.commands.signals import ended_by_signals
from vesicle.errors import VesicleError
from vesicle.streams import ReaderGone, StandardStreams, StreamError
from vesicle.terminal import one_line

USER_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141

# typer re-exports this one error of click's, and newer versions carry a click of their own.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def load_command(name: str, folder: str = "vesicle.commands") -> Any:
    """Import a command with its options (typer's own type, which is click's in older versions).

    Args:
        name: One of the folder's `SUMMARIES`; a command with commands of its own is a folder.
        folder: The package that it is in.
    """
    if name in GROUPS:
        return typer.main.get_command(_group(name, f"{folder}.{name}", SUMMARIES[name]))
    module = import_module(f"{folder}.{name}")
    function = getattr(module, "evaluate" if name == "eval" else name)  # eval is Python's own
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name)(function)
    return typer.main.get_command(alone)


def _group(name: str, folder: str, text: str, epilog: str | None = None) -> typer.Typer:
    """Commands by name and summary, which is all that help and mistyped names need."""

    class Commands(typer.core.TyperGroup):
        def resolve_command(self, *given: Any) -> Any:
            called, summary, rest = super().resolve_command(*given)
            return called, load_command(called, folder) if called else summary, rest

    found = typer.Typer(
        name=name,
        cls=Commands,
        help=text,
        epilog=epilog,
        add_completion=False,
        rich_markup_mode="rich",
    )
    for own, summary in import_module(folder).SUMMARIES.items():
        found.command(own, help=summary)(lambda: None)
    return found


app = _group(
    "vesicle",
    "vesicle.commands",
    "Neurotransmitters for language models: spend compute per token and layer, skip the rest.",
    'Start with: vesicle run "Why is the sky blue?"',
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"vesicle {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    pass


@ended_by_signals
def main(arguments: list[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: What follows the program's name; by default the process's own.

    Returns:
        The exit status; see the module docstring.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    with StandardStreams() as streams:
        try:
            return _run(arguments, streams)
        except ReaderGone:
            return BROKEN_PIPE


def _run(arguments: list[str], streams: StandardStreams) -> int:
    """Run a command line, tell what went wrong, and give the exit status."""
    if arguments[:1] in (["run"], ["eval"]):
        # Read when torch is loaded. Prefill runs on torch's threads, decoding on the native core's
        # own. The former must not go on spinning beside the latter, or beside other programs.
        # Training is twice as fast with threads that spin, and keeps them.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if processors.usable() < len(processors.allowed()):
        os.environ.setdefault(processors.THREADS, str(processors.usable()))
    command = typer.main.get_command(app)
    try:
        with command.make_context("vesicle", arguments or ["--help"]) as context:
            command.invoke(context)
        status = 0
    except typer.Exit as stop:
        status = stop.exit_code
    except VesicleError as error:
        return _fail(str(error))
    except _UsageError as error:
        return _fail(_usage_line(error, arguments))
    except (KeyboardInterrupt, typer.Abort):
        print("\nvesicle: interrupted", file=sys.stderr)
        return INTERRUPTED
    try:
        arrived = streams.finish()
    except StreamError as error:
        return _fail(str(error))
    return status if arrived else status or USER_ERROR


def _fail(message: str) -> int:
    print(f"vesicle: error: {one_line(message)}", file=sys.stderr)
    return USER_ERROR


def _usage_line(error: Exception, arguments: list[str]) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]  # click's
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "vesicle"
    given = _given(getattr(getattr(error, "param", None), "opts", []), arguments)
    what, _, allowed = message.partition(": ")
    if given is not None and what.startswith("Invalid value") and repr(given) not in allowed:
        message = f"{what}, {given!r}: {allowed.removeprefix('Value error, ')}"
    return f"{message.replace(': Value error, ', ': ')} (see {path} --help)"


def _given(options: list[str], arguments: list[str]) -> str | None:
    """What a command line gives an option that goes by these names, last; None for nothing."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, separator, value = word.partition("=")
        if name in options:
            found = value if separator else following
    return found


if __name__ == "__main__":
    sys.exit(main())
