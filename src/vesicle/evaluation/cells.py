"""Cells, lines and tables that the pages of all evaluations are made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


def with_interval(value: float, low: float | None, high: float | None, digits: int) -> str:
    """A number, with its interval if it has one."""
    text = f"{value:.{digits}f}"
    return text if low is None or high is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def difference(value: float, low: float | None, high: float | None, digits: int) -> str:
    """The same of a difference, signed."""
    if low is None or high is None:
        return f"{value:+.{digits}f}"
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def made_with(versions: dict[str, str], hardware: dict[str, Any]) -> str:
    """What numbers were made with, as pages have it."""
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{named}; {hardware['cpu']}, {hardware['cores']} cores."


def markdown_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [_line(names), "|" + " --- |" * len(names), *map(_line, rows)]


def terminal_table(
    names: Sequence[str],
    rows: Iterable[tuple[float, Sequence[str]]],
    *,
    title: str,
    caption: str = "",
) -> Table:
    """A table for the terminal, with a rule between budgets.

    Args:
        names: Headings; the first column is text, the others are numbers.
        rows: Each row's budget and cells.
        title: Above it.
        caption: Below it.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=escape(title),
        title_justify="left",
        caption=escape(caption) or None,
        caption_justify="left",
    )
    for i, name in enumerate(names):
        table.add_column(escape(name), justify="left" if i == 0 else "right")
    before: float | None = None
    for budget, cells in rows:
        if before is not None and before != budget:
            table.add_section()
        table.add_row(*map(escape, cells))
        before = budget
    return table


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"
