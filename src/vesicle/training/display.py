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
