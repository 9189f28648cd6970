"""`vesicle neurons describe`: what neurons fire at, in words, and whether the words tell it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError
from vesicle.terminal import SafeConsole, one_line

if TYPE_CHECKING:
    from torch import Tensor

    from vesicle.neurons.neuron import Neuron
    from vesicle.shapes import ModelShape

_CHARACTERS = 20
"""Of a token at most: what is read of a long text."""
_ROWS = 20
"""Neurons that are printed."""


@recipe.holding_out
def describe(
    data: Annotated[
        str,
        typer.Option(
            help="Text: a .txt, .jsonl or .jsonl.gz file, a folder of those, or a hub data set.",
            metavar="SOURCE",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to; what is in it is gone on with.")],
    neurons: Annotated[
        str | None,
        typer.Option(
            help="Which, as LAYER.NEURON with commas between. \\[default: drawn at random]",
            show_default=False,
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Neurons to draw where none are named.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of that and all other draws.")] = 0,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to look for contexts in.")] = 60_000,
    held_out: Annotated[
        int, typer.Option(min=1, help="Tokens, of the text's end, to judge descriptions on.")
    ] = 20_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 512,
    contexts: Annotated[
        int, typer.Option(min=2, help="Contexts of a neuron, and as many held out.")
    ] = 20,
    weight: Annotated[
        float, typer.Option(min=0, help="Of log p(description) in the mutual information.")
    ] = 0.6,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "train",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Describe what neurons fire at, and judge the descriptions on other contexts.

    Of words from its contexts, classes and answers of the model a neuron gets the one that its
    contexts make likelier most. It is judged by whether it tells held-out contexts of the neuron
    from random ones, beside other neurons' descriptions, another candidate and the best token.

    [bold]Examples[/bold]

      vesicle neurons describe --data train.txt --out runs/described

      vesicle neurons describe --data train.txt --out runs/two --neurons 12.345,3.7
    """
    from vesicle.commands.neurons import subject as shared
    from vesicle.neurons.contexts import windows_of
    from vesicle.neurons.descriptions.describe import Subject, pool_of
    from vesicle.neurons.descriptions.describe import describe as run
    from vesicle.neurons.descriptions.settings import DescribeSettings
    from vesicle.neurons.hooks import Hooked
    from vesicle.training.data import load_documents
    from vesicle.training.display import progress_bar

    settings = DescribeSettings(contexts=contexts, weight=weight, seed=seed)
    documents = load_documents(data, split, field, max_characters=_CHARACTERS * (tokens + held_out))
    loaded = shared.load(model, revision)
    hooked = Hooked(loaded.model)
    chosen = _neurons(neurons, hooked.shape, count, seed)
    first, last = _parted(windows_of(loaded.text, documents, length), tokens, held_out, length)
    total = len(first) + len(last) + len(pool_of(chosen, hooked.shape, settings)) + len(chosen)
    wanted = sys.stderr.isatty() and not as_json
    with progress_bar("describing", total, 0, wanted) as bar:
        subject = Subject(hooked=hooked, text=loaded.text)
        report = run(subject, first, last, chosen, settings, out, show=bar)
    if as_json:
        print_json(report.to_dict())
        return
    _print(report.neurons, report.summary)
    notice(f"wrote {out / 'report.json'}")


def _neurons(named: str | None, shape: ModelShape, count: int, seed: int) -> list[Neuron]:
    from vesicle.neurons.descriptions.describe import drawn_neurons
    from vesicle.neurons.neuron import Neuron

    if named is None:
        return drawn_neurons(shape, count, seed)
    return [Neuron.parse(part, shape) for part in named.split(",")]


def _parted(windows: Tensor, tokens: int, held_out: int, length: int) -> tuple[Tensor, Tensor]:
    """The first windows of a text, and the last ones."""
    n, m = (-(-each // length) for each in (tokens, held_out))
    if len(windows) < n + m:
        raise DataError(
            f"the text has {len(windows)} windows of {length} tokens; --tokens {tokens} and "
            f"--held-out {held_out} need {n + m}"
        )
    return windows[:n], windows[-m:]


def _print(rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from vesicle.neurons.descriptions.report import CONTROLS, DETECTORS

    console = SafeConsole()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("neuron", "side", "description", "kind"):
        table.add_column(name)
    for detector in DETECTORS:
        table.add_column(f"AUC, {detector}", justify="right")
    for row in rows[:_ROWS]:
        areas = [f"{row['detection'][detector]['own']:.2f}" for detector in DETECTORS]
        cells = (row["neuron"], row["side"], one_line(row["description"]), row["kind"], *areas)
        table.add_row(*map(Text, cells))
    console.print(table)
    if len(rows) > _ROWS:
        console.print(f"and {len(rows) - _ROWS} more")
    for detector in DETECTORS:
        own = summary[detector]
        console.print(
            f"\n{detector}: AUC {_told(own['own'])} on held-out contexts; not described "
            f"{own['not_described']} of {summary['neurons']}"
        )
        for name, what in CONTROLS.items():
            above = own[f"above_{name}"]
            console.print(
                f"  {what}: {_told(own[name])}; above that by {_told(above)}", soft_wrap=True
            )
    console.print(f"\nnot described by either: {summary['not_described_by_either']}")


def _told(found: dict[str, Any]) -> str:
    mean = f"{found['mean']:.3f}"
    return mean if found["low"] is None else f"{mean} ({found['low']:.3f} to {found['high']:.3f})"
