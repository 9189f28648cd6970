"""What a running training shows: TensorBoard curves and a progress bar, each only if wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@contextmanager
def curves(
    folder: Path, step: int, wanted: bool, speak: Callable[[str], None]
) -> Iterator[SummaryWriter | None]:
    """A TensorBoard writer, None if unwanted or not installed (then a line tells how to have it).

    Args:
        folder: Where the curves go.
        step: Steps done already; curves beyond it, of a run that was cut off, are superseded.
        wanted: Whether to write at all.
        speak: Takes one-line notices.

    Yields:
        The writer.
    """
    writer = None
    if wanted:
        try:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder), purge_step=step + 1)
        except ImportError:
            speak("no TensorBoard curves: install vesicle[train] to have them")
    try:
        yield writer
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def progress_bar(title: str, total: int, done: int, wanted: bool) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, with the time left and a note.

    Args:
        title: What is going on, in one word.
        total: Steps in all.
        done: Steps done already.
        wanted: Whether to show it.

    Yields:
        Takes the number of a step that is done, what is to be told of it, and the number of steps
        where it turns out to be another.
    """
    if not wanted:
        yield lambda step, note, total=total: None
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
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda step, note, total=total: bar.update(
            task, completed=step, note=note, total=total
        )
