"""What every run of an evaluation tells: what is kept of earlier ones, and how to go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Say = Callable[[str], None]
"""Takes a one-line notice."""


def to_standard_error(line: str) -> None:
    """Where notices go unless they are asked for."""
    print(line, file=sys.stderr)


def tell_kept(say: Say, what: str, kept: int, by_other_code: int, path: Path) -> None:
    """Tell what is done already.

    Args:
        say: Is told.
        what: What is counted, such as `items`.
        kept: How many need not be run again.
        by_other_code: How many must, though they were done before.
        path: The file that holds them.
    """
    if kept:
        say(f"{kept} {what} were done before and are kept")
    if by_other_code:
        say(
            f"{by_other_code} {what} were done by other code than this and are run again; "
            f"their lines stay in {path}"
        )


@contextmanager
def resumable(say: Say, done: Callable[[], str]) -> Iterator[None]:
    """While rows are run: tell after Ctrl-C what is `done`, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted; {done()}: run the same command again to go on")
        raise
