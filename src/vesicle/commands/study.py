"""`vesicle study`: a whole experiment plan, by one command into one report."""

from __future__ import annotations

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vesicle import processors
from vesicle.commands.inputs import check_folder, notice
from vesicle.commands.outputs import print_json
from vesicle.folders import check_free

_SILENT_S = 30
"""Seconds between notes where there is no progress bar."""


class StudyName(StrEnum):
    """Which plan."""

    att = "att"
    duo = "duo"
    neuro = "neuro"


class StudyScale(StrEnum):
    """How large."""

    debug = "debug"
    small = "small"
    full = "full"


def study(
    name: Annotated[
        StudyName,
        typer.Argument(help="att: Adaptive Tensor Tiling; duo: Duo-LLM; neuro: transmitters."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; a study in it is gone on with.")],
    scale: Annotated[
        StudyScale,
        typer.Option(
            help="debug: see that it runs; small: hours on two cores; full: a GPU's size."
        ),
    ] = StudyScale.debug,
    data: Annotated[
        str | None,
        typer.Option(
            help="A local folder of data sets, `sample` for rows that come with Vesicle (enough "
            "for debug); the Hugging Face hub if none."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="More running text to train on: a .txt, .jsonl or .jsonl.gz file, a folder of "
            "those, or a hub data set.",
            metavar="SOURCE",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes side by side, of a thread each. \\[default: one a processor]",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Run a whole experiment plan: train, judge, ablate, draw, time, and write one report.

    What is done is kept, and the same command goes on where it was cut off.

    Speed is measured at the end, alone: leave the machine idle then.

    [bold]Examples[/bold]

      vesicle study att --data sample --out runs/try

      vesicle study att --scale small --data data --out runs/att

      vesicle study duo --scale small --data data --out runs/duo

      vesicle study neuro --scale small --data data --out runs/neuro
    """
    check_folder(out)
    check_free(out)
    from importlib import import_module

    from vesicle.figures import new_figure
    from vesicle.training.display import progress_bar

    new_figure(1, 1)  # what is missing for the report is told before hours of work
    started, told = time.monotonic(), {"next": float(_SILENT_S)}
    shows = sys.stderr.isatty() and not as_json
    with progress_bar("study", 1, 0, shows) as bar:

        def show(job: str, done: int, total: int) -> None:
            bar(done, job, total)
            passed = time.monotonic() - started
            if not shows and passed >= told["next"]:
                told["next"] = passed + _SILENT_S
                notice(f"{job} done, {done} of {total}")

        found = import_module(f"vesicle.studies.{name.value}").run_study(
            out,
            scale.value,
            data=data,
            text=text,
            workers=workers or processors.usable(),
            show=show,
        )
    if as_json:
        print_json(found)
        return
    notice(f"wrote {out / 'report.html'} and report.json")
