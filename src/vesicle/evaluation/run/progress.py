"""The progress bar of evaluations: tokens of all rows, with the time left.

A row never moves the bar beyond its own share, so that one that takes longer than expected does not
spoil the estimate of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

Tick = Callable[[int], None]


@contextmanager
def progress_bar(
    sizes: Sequence[int], wanted: bool
) -> Iterator[Callable[[str], AbstractContextManager[Tick]]]:
    """Show a bar over rows of these sizes; yields what opens the next row by its name."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from vesicle.terminal import SafeConsole

    remaining = iter(sizes)
    done = 0
    with Progress(
        TextColumn("evaluating"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=SafeConsole(stderr=True),
        disable=not wanted,
        speed_estimate_period=300,
    ) as bar:
        task = bar.add_task("evaluating", total=max(1, sum(sizes)), note="")

        @contextmanager
        def row(name: str) -> Iterator[Tick]:
            nonlocal done
            size, seen = next(remaining), 0
            bar.update(task, note=name)

            def tick(n: int) -> None:
                nonlocal seen
                seen += n
                bar.update(task, completed=done + min(seen, size))

            yield tick
            done += size
            bar.update(task, completed=done)

        yield row
