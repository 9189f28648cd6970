"""What a running training shows: TensorBoard curves and a progress bar, each only if wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
def progress_bar(total: int, done: int, wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A progress bar on standard error with the time left, loss and share.

    Args:
        total: Steps in all.
        done: Steps done already.
        wanted: Whether to show it.

    Yields:
        Takes a step's line of metrics.
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
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task("training", total=total, completed=done, note="")

        def show(line: dict[str, Any]) -> None:
            note = (
                f"loss {line['loss']:.4f}  KL {line['kl']:.4f}  "
                f"share {line['share']:.3f} of {line['budget']:.3f}"
            )
            bar.update(task, completed=line["step"], note=note)

        yield show
