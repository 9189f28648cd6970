"""The progress bar of a run of evolution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress_bar(total: int, wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar on standard error with the time left and the losses.

    Args:
        total: Generations in all.
        wanted: Whether to show it.

    Yields:
        Takes a generation's line.
    """
    if not wanted:
        yield lambda line: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("evolving"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    ) as bar:
        task, held_out = bar.add_task("evolving", total=total, note=""), ""

        def show(line: dict[str, Any]) -> None:
            nonlocal held_out
            if "held_out" in line:
                held_out = f"  held out {line['held_out']:.3f}"
            losses = line["losses"]
            note = f"best {min(losses):.3f}  mean {sum(losses) / len(losses):.3f}{held_out}"
            bar.update(task, completed=line["generation"], note=note)

        yield show
