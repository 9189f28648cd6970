"""`vesicle neurons experts`: MoE-X's experts against dense neurons and autoencoders."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands.inputs import check_folder, notice
from vesicle.commands.outputs import print_json
from vesicle.errors import VesicleError
from vesicle.folders import check_free

if TYPE_CHECKING:
    from rich.table import Table


class ExpertTask(StrEnum):
    """What decoders are trained on."""

    chess = "chess"
    text = "text"


class ExpertScale(StrEnum):
    """How large."""

    debug = "debug"
    small = "small"


def experts(
    out: Annotated[Path, typer.Option(help="Folder to write to; what is in it is gone on with.")],
    task: Annotated[
        ExpertTask, typer.Option(help="chess: games that are made here; text: that of --data.")
    ] = ExpertTask.chess,
    scale: Annotated[
        ExpertScale,
        typer.Option(help="debug: see that it runs; small: about 20 minutes a seed on one core."),
    ] = ExpertScale.debug,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds; more can follow later.")] = 3,
    data: Annotated[
        str | None,
        typer.Option(
            help="Of task text: a .txt, .jsonl or .jsonl.gz file, a folder of those, a hub data "
            "set, or sample (enough for debug).",
            metavar="SOURCE",
            show_default=False,
        ),
    ] = None,
    gated: Annotated[
        bool,
        typer.Option(
            "--gated/--no-gated", help="FFNs with a gate, as Llama's; plain in the paper."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Train experts that route by sparsity, and ask what their neurons know.

    Beside them stand a dense decoder of equal active width, a dense one with as many units as all
    experts, experts with learnt routing, converted ones, sparse autoencoders, and controls.

    What is done is kept, and the same command goes on where it was cut off.

    [bold]Examples[/bold]

      vesicle neurons experts --out runs/try --seeds 1

      vesicle neurons experts --task chess --scale small --out runs/chess

      vesicle neurons experts --task text --data train.txt --scale small --out runs/text
    """
    if task is ExpertTask.text and data is None:
        raise VesicleError("--task text needs --data: a file, a folder, a hub data set, or sample")
    if task is ExpertTask.chess and data is not None:
        raise VesicleError(
            f"--data is {data}, but the games of --task chess are made: leave it out"
        )
    check_folder(out)
    check_free(out)
    from vesicle.files import atomic_path, write_json
    from vesicle.neurons.experts.chess_games import check_chess
    from vesicle.neurons.experts.page import page
    from vesicle.neurons.experts.settings import settings_of
    from vesicle.neurons.experts.study import run_comparison
    from vesicle.neurons.experts.summary import summarise
    from vesicle.training.display import progress_bar

    if task is ExpertTask.chess:
        check_chess()
    settings = settings_of(task.value, scale.value, gated=gated)
    total = seeds * settings.steps_of_a_seed
    with progress_bar("experts", total, 0, sys.stderr.isatty() and not as_json) as bar:
        corpus, results = run_comparison(out, settings, seeds, data, bar)
    report = summarise(settings, corpus, results)
    write_json(out / "report.json", report)
    with atomic_path(out / "report.html") as part:
        part.write_text(page(report), encoding="utf-8")
    if as_json:
        print_json(report)
        return
    _show(report)
    notice(f"wrote {out / 'report.html'} and report.json")


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        _readers(report, Table(title="mean ± half of the 95 % interval over games or texts"))
    )
    claims = Table("claim", "difference", "verdict", title="claims and controls")
    for row in report["claims"]:
        claims.add_row(
            row["claim"],
            f"{row['metric'].replace('_', ' ')} {_figures(row['difference'], '+.3f')}",
            row["verdict"],
        )
    console.print(claims)


def _readers(report: dict[str, Any], table: Table) -> Table:
    for head in ("", "loss", "legal", "active", "coverage", "at equal number", "reconstruction"):
        table.add_column(head)
    for name, row in report["readers"].items():
        active = f"{row['active']:.0f} of {row['features']:.0f}" if "active" in row else ""
        told = {m: _figures(row[m]) if m in row else "" for m in report["metrics"]}
        table.add_row(
            name,
            told["loss"],
            told["legal"],
            active,
            told["coverage"],
            told["equal_coverage"],
            told["reconstruction"],
        )
    return table


def _figures(row: dict[str, Any], form: str = ".3f") -> str:
    return f"{row['mean']:{form}} ±{(row['high'] - row['low']) / 2:.3f}"
