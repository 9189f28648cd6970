"""Reading and checking what a user gives, before anything heavy is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from vesicle.errors import BudgetError, DataError, VesicleError
from vesicle.files import read_text

REVISION = "Branch, tag or commit, if --model is a hub id."
"""Of the option that every command with `--model` has."""


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, from standard input (for `-`) or from a file.

    One final line end of standard input or a file is dropped, as shells do.

    Raises:
        DataError: There is none, or two, or it is blank or not UTF-8, or the file cannot be read.
    """
    if prompt is not None and file is not None:
        raise DataError("PROMPT and --file are both given; give one")
    if file is not None:
        text, source = _without_line_end(read_text(file)), str(file)
    elif prompt == "-":
        text, source = _without_line_end(_read_standard_input()), "standard input"
    elif prompt is not None:
        text, source = prompt, "PROMPT"
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError("PROMPT is not UTF-8 text") from error
    else:
        raise DataError("no prompt: give PROMPT, - to read standard input, or --file")
    if not text.strip():
        raise DataError(f"{source} is empty; a prompt needs at least one visible character")
    return text


def check_budget(budget: float | None) -> None:
    """Refuse a budget outside (0, 1]; as `modulator.check_budget`, which takes seconds to import.

    Raises:
        BudgetError: If it is outside, or not a number.
    """
    if budget is not None and not 0 < budget <= 1:
        raise BudgetError(f"--budget is {budget}; allowed: above 0, up to 1")


def check_writable(path: Path | None, option: str) -> None:
    """Make the folder of a file to be written, so that hours of work cannot end in an error.

    Raises:
        VesicleError: The file cannot be written there.
    """
    if path is None:
        return
    if path.is_dir():
        raise VesicleError(f"{option} {path} is a folder; a file is needed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VesicleError(f"{option} {path}: {error.strerror or error}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise VesicleError(f"{option} {path} cannot be written: permission denied")


def notice(line: str) -> None:
    """Tell something in one line on standard error."""
    print(f"vesicle: {line}", file=sys.stderr)


def _read_standard_input() -> str:
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
            f"{error.start}"
        ) from error


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
