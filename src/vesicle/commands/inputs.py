"""Reading and checking what a user gives, before anything heavy is loaded."""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from vesicle.errors import BudgetError, DataError, VesicleError
from vesicle.files import check_target, decode_text, read_some
from vesicle.terminal import one_line

if TYPE_CHECKING:
    from vesicle.phases import Phases

_MOST_BYTES = 64_000_000
"""Of a prompt; far more than any context window takes, and less than memory."""

MODEL = (
    "A folder, a .gguf file, a hub id or a name that vesicle models lists; the default model if "
    "none."
)
REVISION = "Branch, tag or commit, if --model is a hub id."
"""Of the two options of commands that need a model."""

PHASE = (
    "On which tokens transmitters act: generated (and scored), all, prompt or never; for one alone "
    "gaba=all. Repeatable. \\[default: generated, but for what --goal time says]"
)
"""Of the option that every command with `--budget` has."""

GOAL = (
    "What a lower budget is to save: time (transmitters that save none on this processor rest), or "
    "flops (all act)."
)
"""Of the option of commands that answer and that measure speed."""


class Goal(StrEnum):
    """What a lower budget is to save."""

    time = "time"
    flops = "flops"


def read_phases(words: Sequence[str] | None, goal: Goal = Goal.flops) -> Phases:
    """What `--phase` and `--goal` say.

    Raises:
        VesicleError: Naming the word and what is allowed.
    """
    from vesicle.phases import Phases

    default = None
    if goal is Goal.time:
        from vesicle.engine import core
        from vesicle.processors import maker

        default = Phases.saving_time(core.instructions(), maker())
    return Phases.parse(words or (), default)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, from standard input (for `-`) or from a file.

    One final line end of standard input or a file is dropped, as shells do.

    Raises:
        DataError: There is none, or two, or it is blank, not UTF-8 text or endless, or it cannot be
            read.
    """
    if prompt is not None and file is not None:
        raise DataError("PROMPT and --file are both given; give one")
    if file is not None:
        text, source = _text(read_some(file, _MOST_BYTES + 1), str(file)), str(file)
    elif prompt == "-":
        source = "standard input"
        text = _text(_read_standard_input(), source)
    elif prompt is not None:
        text, source = argument_text(prompt, "PROMPT"), "PROMPT"
    else:
        raise DataError("no prompt: give PROMPT, - to read standard input, or --file")
    if all(_invisible(character) for character in text):
        raise DataError(f"{source} is empty; a prompt needs at least one visible character")
    return text


def argument_text(argument: str, name: str) -> str:
    """The text of an argument, which Python decodes as the locale says, or not at all.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        argument.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeError as error:
            raise DataError(f"{name} is not UTF-8 text") from error
    return argument


def check_budget(budget: float | None) -> None:
    """Refuse a budget outside (0, 1]; as `modulator.check_budget`, which takes seconds to import.

    Raises:
        BudgetError: If it is outside, or not a number.
    """
    if budget is not None and not 0 < budget <= 1:
        raise BudgetError(f"--budget is {budget}; allowed: above 0, up to 1")


def check_writable(path: Path | None, option: str) -> None:
    """Refuse a file that cannot be written, so that hours of work cannot end in an error.

    Raises:
        VesicleError: The file cannot be written there.
    """
    if path is not None:
        _check_target(path, option, folder=False)


def check_folder(path: Path, option: str = "--out") -> None:
    """The same for a folder to write files in; it need not exist.

    Raises:
        VesicleError: It is a file, or files cannot be written in it.
    """
    _check_target(path, option, folder=True)


def check_namm(folder: Path) -> None:
    """Refuse a folder that is no NAMM, before numpy is loaded to read it.

    Raises:
        DataError: It holds no `namm.json`.
    """
    if not (folder / "namm.json").is_file():
        raise DataError(f"--namm: {folder} holds no namm.json; a NAMM is a folder with one")


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers with commas between, as an option has them.

    Raises:
        VesicleError: Naming the option.
    """
    if not text.strip():
        return ()
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise VesicleError(f"{option} is {text!r}; allowed: numbers with commas between") from error


def notice(line: str) -> None:
    """Tell something in one line on standard error."""
    print(f"vesicle: {one_line(line)}", file=sys.stderr)


def _check_target(path: Path, option: str, *, folder: bool) -> None:
    try:
        check_target(path, folder=folder)
    except VesicleError as error:
        raise VesicleError(f"{option}: {error}") from error


def _read_standard_input() -> bytes:
    if sys.stdin is None:  # as Python has it where it was closed when the process began
        raise DataError("cannot read standard input: it is closed")
    try:
        return sys.stdin.buffer.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read standard input: {error.strerror or error}") from error


def _text(data: bytes, source: str) -> str:
    """Text without its final line end."""
    if len(data) > _MOST_BYTES:
        raise DataError(f"{source} is longer than {_MOST_BYTES // 1_000_000} MB, too long a prompt")
    if (at := data.find(0)) >= 0:
        raise DataError(f"{source} is not UTF-8 text: it has a zero byte at offset {at}")
    return decode_text(data, source).removesuffix("\n").removesuffix("\r")


def _invisible(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in ("Cc", "Cf")
