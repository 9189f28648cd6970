"""Telling how far a run is, on standard error, between turns only.

A bar that redraws itself would take time from the contender whose turn it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from vesicle.bench.results import Row
from vesicle.terminal import SafeConsole, one_line

_SILENT_S = 20.0
"""Without a bar, how long nothing is said while turns go on."""


class Display:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, bar: Progress) -> None:
        """Show a run as one task of `bar`, or as lines where it is disabled; see `showing`."""
        self._bar = bar
        self._task = bar.add_task("starting", total=1.0, left="")
        self._begun: float | None = None
        self._said = time.monotonic()

    def stage(self, text: str) -> None:
        """Show what begins or went wrong, as the bar's description and as a line."""
        self._bar.update(self._task, description=text)
        self._say(text)

    def turn(self, text: str, done: float) -> None:
        """A turn begins, with `done` of the work behind it; a line now and then without a bar."""
        now = time.monotonic()
        self._begun = now if self._begun is None else self._begun
        left = ""
        if done > 0:
            left = f"about {_minutes((now - self._begun) * (1 - done) / done)} left"
        if self._bar.disable and now - self._said >= _SILENT_S:
            self._say(f"{text}{left and ', ' + left}")
        self._bar.update(self._task, description=text, completed=done, left=left)
        self._bar.refresh()

    def row(self, row: Row) -> None:
        """Print a finished row: median speeds in tokens/s, and a mark if it is not valid."""
        text = (
            f"{row.prompt_tokens} tokens x {row.batch}: {row.contender}: "
            f"prefill {row.prefill_tokens_per_s.median:.0f} tokens/s, "
            f"decode {row.decode_tokens_per_s.median:.1f} tokens/s"
            + ("" if row.valid else " (NOT VALID)")
        )
        self._say(text)

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        if self._bar.disable:
            print(f"vesicle: {one_line(text)}", file=sys.stderr)
        else:
            self._bar.console.print(f"vesicle: {text}", highlight=False, markup=False)
            self._bar.refresh()


@contextmanager
def showing() -> Iterator[Display]:
    """A display while a benchmark runs."""
    console = SafeConsole(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("{task.fields[left]}"),
        console=console,
        auto_refresh=False,
        disable=not console.is_terminal,
    ) as bar:
        yield Display(bar)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
