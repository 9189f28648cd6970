"""`vesicle neurons lens`: a Jacobian lens, beside none."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.neurons.subject import DATA, MOST_SEED, check_apart, check_strength
from vesicle.commands.outputs import print_json

_LENGTH = 24


@recipe.holding_out
def lens(
    out: Annotated[Path, typer.Option(help="Folder to write to; a fit in it is gone on with.")],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    data: Annotated[str | None, typer.Option(help=DATA, metavar="SOURCE")] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "train",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    texts: Annotated[int, typer.Option(min=1, help="Texts to fit on, of 24 tokens each.")] = 24,
    neurons: Annotated[int, typer.Option(min=3, help="Neurons to compare on.")] = 90,
    prompts: Annotated[int, typer.Option(min=1, help="Other texts to compare in.")] = 16,
    strength: Annotated[
        float, typer.Option(help="Times the largest value that a neuron has in the text.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of texts and neurons.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison.")] = False,
) -> None:
    """Fit a Jacobian lens, and tell whether it foretells clamps better than none.

    The lens is the average Jacobian from what each layer leaves to what the last one does. It and
    the plain readout foretell what holding a neuron does to all tokens' probabilities.

    [bold]Examples[/bold]

      vesicle neurons lens --data train.txt --out runs/lens

      vesicle neurons decode --lens runs/lens --out runs/decoded-by-lens
    """
    check_apart(out)
    check_strength(strength)
    from vesicle.commands.neurons import subject as shared
    from vesicle.files import write_json
    from vesicle.neurons.clamping import largest_values
    from vesicle.neurons.decoding.lens import compare, fit_lens
    from vesicle.neurons.hooks import Hooked
    from vesicle.training.display import progress_bar

    subject = shared.load(model, revision)
    hooked = Hooked(subject.model)
    windows = shared.texts(
        subject, data, split, field, length=_LENGTH, count=texts + prompts, seed=seed
    )
    spans = shared.texts(
        subject, data, split, field, length=shared.span(subject), count=4, seed=seed
    )
    shows = sys.stderr.isatty() and not as_json
    with progress_bar("fitting", texts, 0, shows) as bar:
        maps = fit_lens(hooked, windows[:texts], out, show=bar)
    with progress_bar("comparing", neurons, 0, shows) as bar:
        found = compare(
            hooked,
            maps,
            windows[texts:],
            largest_values(hooked, spans, "down"),
            count=neurons,
            strength=strength,
            seed=seed,
            show=bar,
        )
    write_json(out / "compared.json", found, indent=2)
    if as_json:
        print_json(found)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("layers", "plain", "lens", "shuffled", "lens above plain, 95 %")
    thirds = ("first third", "middle third", "last third")
    for name, row in zip(("all", *thirds), (found["all"], *found["by_third"]), strict=False):
        more = row["lens_above_plain"]
        table.add_row(
            name,
            *(f"{row[kind]['mean']:+.3f}" for kind in ("plain", "lens", "shuffled")),
            f"{more['mean']:+.3f} ({more['low']:+.3f} to {more['high']:+.3f})",
        )
    table.title = "correlation of what was foretold with what happened, over tokens"
    Console().print(table)
    notice(f"wrote {out / 'lens.safetensors'} and compared.json")
