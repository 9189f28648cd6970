"""`vesicle neurons card`: one neuron's card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vesicle.commands.inputs import REVISION
from vesicle.commands.outputs import print_json


def card(
    neuron: Annotated[str, typer.Argument(help="LAYER.NEURON, such as 12.345.")],
    cards: Annotated[Path, typer.Option(help="A folder of vesicle neurons report.")],
    model: Annotated[
        str | None,
        typer.Option(help="The model of the cards, where it is not found by the name in them."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the card as JSON.")] = False,
) -> None:
    """Show the card of one neuron.

    [bold]Examples[/bold]

      vesicle neurons card 12.345 --cards runs/atlas
    """
    from vesicle.models import Text, resolve_model
    from vesicle.neurons.cards import Cards
    from vesicle.neurons.neuron import Neuron

    found = Cards.load(cards)
    own = Neuron.parse_within(neuron, *found.shape)
    text = Text.from_folder(resolve_model(model or found.model, revision=revision, weights=False))
    found.check_text(text)
    told = found.card(own, text)
    if as_json:
        print_json(told.to_dict())
        return
    from rich.console import Console
    from rich.text import Text as Styled

    from vesicle.terminal import visible

    console = Console()
    console.print(f"neuron {told.neuron}", style="bold", highlight=False)
    for kind, row in told.tokens.items():
        words = "  ".join(visible(repr(word)) for word in row["likeliest"])
        console.print(f"{kind:>5} {row['way']} {row['score']:.1f}  {words}", markup=False)
    console.print(
        f"mean {told.mean:+.3f}, deviation {told.deviation:.3f}, above half of its maximum at "
        f"{told.share_above_half:.2%} of tokens",
        highlight=False,
    )
    for name, row in told.drives.items():
        console.print(f"drives {name} by {row['drive']:+.2e}, rank {row['rank']:.0f}")
    for title, contexts in (("highest", told.highest), ("lowest", told.lowest)):
        console.print(title, style="bold")
        for one in contexts:
            line = Styled(f"{one.activation:+8.2f}  ")
            line.append(visible(one.before.replace("\n", " ")))
            line.append(visible(one.token) or "·", style="reverse")
            line.append(visible(one.behind.replace("\n", " ")))
            console.print(line)
