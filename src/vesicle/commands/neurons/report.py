"""`vesicle neurons report`: a card for every neuron, in one page that can be searched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vesicle.commands import recipe
from vesicle.commands.inputs import MODEL, REVISION, notice
from vesicle.commands.neurons.subject import DATA, check_apart, check_below_rest
from vesicle.commands.outputs import print_json

_CHARACTERS = 32
"""Of text, read for each token that is wanted: more than tokens have, and not all there is."""


@recipe.holding_out
def report(
    out: Annotated[Path, typer.Option(help="Folder to write to; cards in it are gone on with.")],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    data: Annotated[str | None, typer.Option(help=DATA, metavar="SOURCE")] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "train",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to read.")] = 65_536,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 512,
    modulator: Annotated[
        Path | None,
        typer.Option(help="A folder; the one that ships with the model if none, and if there is."),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="At which levels are attributed to neurons, below 1.")
    ] = 0.7,
    as_json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Make a card for every neuron of a model, and one page with all of them.

    A card has the tokens that a neuron's weights decode to, where it fires in the text, and what
    it contributes to the levels of transmitters. The page needs no server and can be searched. A
    run that was cut off is gone on with by the same command.

    [bold]Examples[/bold]

      vesicle neurons report --data train.txt --out runs/atlas

      vesicle neurons report --out runs/try --tokens 1024 --length 128
    """
    check_apart(out)
    check_below_rest(budget)
    import time

    from vesicle.commands.neurons import subject as shared
    from vesicle.files import atomic_path, write_json
    from vesicle.neurons.atlas import page, summary
    from vesicle.neurons.cards import CardSettings, make_cards
    from vesicle.neurons.contexts import windows_of
    from vesicle.training.data import load_documents
    from vesicle.training.display import progress_bar

    started = time.monotonic()
    subject = shared.load(model, revision)
    hooked = shared.hooked(subject, model, modulator, budget)
    if hooked.method is None:
        notice("no modulator ships with this model: cards have no drives, and --budget is not used")
    documents = load_documents(
        *shared.source(data, split), field, max_characters=_CHARACTERS * max(tokens, length)
    )
    wanted = -(-tokens // length)
    windows = windows_of(subject.text, documents, length)[:wanted]
    if len(windows) < wanted:
        notice(f"the text has {windows.numel()} tokens in whole windows of {length}: all are read")
    shows = sys.stderr.isatty() and not as_json
    with progress_bar("cards", 1, 0, shows) as bar:

        def show(what: str, done: int, total: int, note: str) -> None:
            bar(done, f"{what}: {note}", total)

        cards = make_cards(hooked, windows, out, CardSettings(), name=subject.name, show=show)
    told: dict[str, Any] = summary(cards, subject.text)
    write_json(out / "report.json", told, indent=2)
    with atomic_path(out / "atlas.html") as part:
        part.write_text(page(cards, subject.text), encoding="utf-8")
    if as_json:
        print_json(told)
        return
    notice(
        f"wrote {out / 'atlas.html'}: {told['neurons']} cards in {time.monotonic() - started:.0f} s"
    )
