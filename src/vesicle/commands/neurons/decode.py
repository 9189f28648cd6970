"""`vesicle neurons decode`: every neuron as tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.neurons.subject import check_apart
from vesicle.commands.outputs import print_json
from vesicle.errors import DataError


@recipe.holding_out
def decode(
    out: Annotated[Path, typer.Option(help="Folder to write to; a run in it is gone on with.")],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    top: Annotated[int, typer.Option(min=1, help="Tokens of each direction.")] = 8,
    lens: Annotated[
        Path | None,
        typer.Option(help="A folder of vesicle neurons lens, to carry directions to the end by."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="A folder of another run, of another checkpoint: tell how many neurons keep "
            "their token."
        ),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Neurons to print of each projection.")] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print what is shown as JSON.")] = False,
) -> None:
    """Decode every neuron of a model into tokens, through the LM head.

    Of a neuron's gate and up projection the direction that excites it is read, of its down
    projection the one that it writes. The most specialised neurons are shown, all are written.

    [bold]Examples[/bold]

      vesicle neurons decode --out runs/decoded

      vesicle neurons decode --model runs/tuned --out runs/tuned-decoded --against runs/decoded
    """
    check_apart(out)
    if against is not None and against.resolve() == out.resolve():
        raise DataError(f"--against and --out are both {out}; give the folder of another run")
    from vesicle.commands.neurons import subject as shared
    from vesicle.neurons.decoding.lens import load_lens
    from vesicle.neurons.decoding.tokens import Decoded, check_alike, decode_all, same_top_token
    from vesicle.training.display import progress_bar

    other = None if against is None else Decoded.load(against)
    subject = shared.load(model, revision)
    maps = None if lens is None else load_lens(lens, subject.model)
    n_layers = subject.model.config.num_hidden_layers
    if other is not None:
        check_alike(other, subject.model)
    with progress_bar("decoding", n_layers, 0, sys.stderr.isatty() and not as_json) as bar:
        found = decode_all(subject.model, out, name=subject.name, k=top, lens=maps, show=bar)
    told = {
        "model": subject.name,
        "neurons": found.ids.shape[0] * found.ids.shape[2],
        "specialised": {
            kind: [
                {
                    "neuron": f"{layer}.{index}",
                    "way": way,
                    "score": round(score, 3),
                    "tokens": [subject.text.decode([i]) for i in ids],
                }
                for layer, index, way, score, ids in found.specialised(kind, show)
            ]
            for kind in found.kinds
        },
        "same_top_token": None
        if other is None
        else {kind: same_top_token(found, other, kind) for kind in found.kinds},
    }
    if as_json:
        print_json(told)
        return
    _print(told)
    notice(f"wrote {out / 'decoded.safetensors'} and decoded.json")


def _print(told: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    from vesicle.terminal import visible

    console = Console()
    specialised = told["specialised"]
    assert isinstance(specialised, dict)
    for kind, rows in specialised.items():
        table = Table("neuron", "way", "score", "tokens", title=f"{kind} projection")
        for row in rows:
            words = "  ".join(visible(repr(word)) for word in row["tokens"])
            sign = "+" if row["way"] > 0 else "-"
            table.add_row(row["neuron"], sign, f"{row['score']:.1f}", words)
        console.print(table, markup=False) if rows else None
    same = told["same_top_token"]
    if isinstance(same, dict):
        for kind, shares in same.items():
            console.print(
                f"{kind}: {shares['same']:.1%} of neurons keep their token "
                f"({shares['shuffled']:.1%} by chance)"
            )
