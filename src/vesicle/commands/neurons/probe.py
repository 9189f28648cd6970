"""`vesicle neurons probe`: which neurons drive a transmitter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vesicle.commands.inputs import MODEL, REVISION, check_writable, notice
from vesicle.commands.neurons.subject import DATA, MOST_SEED, check_below_rest
from vesicle.commands.outputs import print_json
from vesicle.errors import VesicleError

if TYPE_CHECKING:
    from vesicle.neurons.hooks import Hooked


def probe(
    modulator: Annotated[
        Path | None, typer.Option(help="A folder; the one that ships with the model if none.")
    ] = None,
    transmitter: Annotated[
        str | None,
        typer.Option(
            help="With commas between; all that are released if none.", show_default=False
        ),
    ] = None,
    budget: Annotated[float, typer.Option(help="Share of the dense FLOPs, below 1.")] = 0.7,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    revision: Annotated[str | None, typer.Option(help=REVISION)] = None,
    data: Annotated[str | None, typer.Option(help=DATA, metavar="SOURCE")] = None,
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "test",
    field: Annotated[str, typer.Option(help="The field of JSON lines with the text.")] = "text",
    texts: Annotated[int, typer.Option(min=2, help="Texts, half to attribute on.")] = 16,
    length: Annotated[int, typer.Option(min=9, help="Tokens of a text.")] = 64,
    count: Annotated[int, typer.Option(min=1, help="Neurons to lesion.")] = 50,
    draws: Annotated[int, typer.Option(min=1, help="Of as many random neurons.")] = 5,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Of texts and random neurons.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="A JSON file to write to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the neurons that drive a transmitter, and check them by lesion.

    Levels are attributed to neurons by slopes, on half of the texts. On the others the neurons
    that contribute most are held at their means, beside random ones of the same layers; and each
    transmitter is held at fixed doses, to see what it does to loss and cost.

    [bold]Examples[/bold]

      vesicle neurons probe --data test.txt

      vesicle neurons probe --transmitter gaba,dopamine --budget 0.8 --json
    """
    check_below_rest(budget)
    check_writable(out, "--out")
    from vesicle.commands.neurons import subject as shared
    from vesicle.files import write_json
    from vesicle.neurons.doses import doses
    from vesicle.neurons.probes import attribute, check_by_lesion
    from vesicle.training.display import progress_bar

    subject = shared.load(model, revision)
    hooked = shared.hooked(subject, model, modulator, budget)
    names = _wanted(hooked, transmitter)
    ids = shared.texts(subject, data, split, field, length=length, count=texts, seed=seed)
    seen, others = ids[: texts // 2], ids[texts // 2 :]
    shows = sys.stderr.isatty() and not as_json
    told: dict[str, Any] = {"model": subject.name, "budget": budget, "transmitters": {}}
    for name in names:
        with progress_bar(name, len(seen) + len(others), 0, shows) as bar:
            found = attribute(hooked, name, seen, show=bar)

            def later(done: int, note: str, bar: Any = bar) -> None:
                bar(len(seen) + done, note)

            lesioned = check_by_lesion(
                hooked, found, others, count=count, draws=draws, seed=seed, show=later
            )
        told["transmitters"][name] = {
            "neurons": [
                {
                    "neuron": f"{layer}.{index}",
                    "drive": float(found.drive[layer, index]),
                    "size": float(found.size[layer, index]),
                }
                for layer, index in found.top(20)
            ],
            "lesion": lesioned,
            "doses": doses(hooked, name, others),
        }
    if out is not None:
        write_json(out, told, indent=2)
    if as_json:
        print_json(told)
        return
    _print(told)
    if out is not None:
        notice(f"wrote {out}")


def _wanted(hooked: Hooked, given: str | None) -> list[str]:
    """The transmitters that were named, or all that are released.

    Raises:
        VesicleError: There is no modulator, or it does not release one of them.
    """
    from vesicle.modulator import ModulatorMethod

    if not isinstance(hooked.method, ModulatorMethod):
        raise VesicleError("no modulator is shipped for this model; give one with --modulator")
    released = hooked.method.modulator.predictor.config.transmitters
    if given is None:
        return list(released)
    names = [name.strip() for name in given.split(",")]
    for name in names:
        if name not in released:
            raise VesicleError(f"--transmitter is {name!r}; allowed: {', '.join(released)}")
    return list(dict.fromkeys(names))


def _print(told: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("transmitter", "named", "random", "named above random, 95 %", "first neurons")
    for name, found in told["transmitters"].items():
        lesion = found["lesion"]
        more = lesion["named_above_random"]
        table.add_row(
            name,
            f"{lesion['named']['mean']:.4f}",
            f"{lesion['random']['mean']:.4f}",
            f"{more['mean']:+.4f} ({more['low']:+.4f} to {more['high']:+.4f})",
            " ".join(row["neuron"] for row in found["neurons"][:5]),
        )
    table.title = "change of released levels when neurons are held at their means"
    console.print(table)
    for name, found in told["transmitters"].items():
        dose = Table("dose", "nats more", "share of dense FLOPs", title=f"{name} held at")
        for row in found["doses"]:
            dose.add_row(f"{row['dose']:.2f}", f"{row['nats']:+.4f}", f"{row['share']:.3f}")
        console.print(dose)
